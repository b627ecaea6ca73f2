"""Tickets: nothing in them can be changed, and each reason to refuse one is named."""

from __future__ import annotations

import hashlib
import hmac
import itertools

import pytest

from kvtransfer import ticket as tickets
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from legato.v1.worker_pb2 import ModelIdentity, SignedTicket, Ticket
from spec.dtype import Dtype
from spec.errors import TicketRefused
from spec.layout import KVLayout

KEY = b"k" * 32
NOW_NS = 1_800_000_000_000_000_000
LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_tokens=4, dtype=Dtype.FLOAT32)
IDENTITY = ModelIdentity(model_id="smollm2", revision="abc", adapter="", compute_dtype="float32")
TOKENS = list(range(10))


def a_ticket() -> Ticket:
    return Ticket(
        reservation_id="r1",
        sequence_id="s1",
        prefix_digest=tickets.prefix_digest(IDENTITY, TOKENS),
        num_tokens=10,
        identity=IDENTITY,
        kv_layout_id=LAYOUT.layout_id,
        producer_id="p0",
        producer_epoch=7,
        consumer_id="d0",
        consumer_epoch=9,
        block_ids=[4, 5, 6],
        block_generations=[1, 2, 3],
        first_token=4,
        expires_unix_ns=NOW_NS + 1_000_000_000,
    )


def refused(signed: SignedTicket, cause: str, key: bytes = KEY, now_unix_ns: int = NOW_NS) -> None:
    with pytest.raises(TicketRefused) as caught:
        tickets.verify(key, signed, now_unix_ns=now_unix_ns)
    assert caught.value.details["cause"] == cause


def test_what_was_issued_is_what_is_verified() -> None:
    signed = tickets.issue(KEY, a_ticket())
    assert tickets.verify(KEY, signed, now_unix_ns=NOW_NS) == a_ticket()
    assert signed.signature == hmac.new(KEY, signed.ticket, hashlib.sha256).digest()


CHANGES = {
    "reservation_id": "r2", "sequence_id": "s2", "prefix_digest": bytes(32), "num_tokens": 11, "kv_layout_id": "x",
    "producer_id": "p1", "producer_epoch": 8, "consumer_id": "d1", "consumer_epoch": 10, "first_token": 0,
    "expires_unix_ns": NOW_NS * 2,
}  # fmt: skip


def test_every_field_is_under_the_signature() -> None:
    signature = tickets.issue(KEY, a_ticket()).signature
    altered = []
    for field, value in CHANGES.items():
        altered.append(a_ticket())
        setattr(altered[-1], field, value)
    for field in ("block_ids", "block_generations"):
        altered.append(a_ticket())
        getattr(altered[-1], field)[1] = 99
    for field in ("model_id", "revision", "adapter", "compute_dtype"):
        altered.append(a_ticket())
        setattr(altered[-1].identity, field, "other")
    named = {*CHANGES, "block_ids", "block_generations", "identity"}
    assert named == {field.name for field in Ticket.DESCRIPTOR.fields}, "a new field needs a row here"
    for ticket in altered:
        assert ticket != a_ticket()
        refused(SignedTicket(ticket=ticket.SerializeToString(), signature=signature), "forged")


def test_every_bit_of_the_bytes_counts() -> None:
    signed = tickets.issue(KEY, a_ticket())
    for at in range(len(signed.ticket)):
        bent = bytearray(signed.ticket)
        bent[at] ^= 1 << (at % 8)
        refused(SignedTicket(ticket=bytes(bent), signature=signed.signature), "forged")
    for wrong in (b"", signed.signature[:-1], signed.signature + b"\0", bytes(32)):
        refused(SignedTicket(ticket=signed.ticket, signature=wrong), "forged")
    refused(signed, "forged", key=b"other")


def test_no_key_is_no_signature() -> None:
    with pytest.raises(TicketRefused):
        tickets.issue(b"", a_ticket())
    refused(tickets.issue(KEY, a_ticket()), "no_key", key=b"")


def test_a_ticket_ends_at_its_time() -> None:
    signed = tickets.issue(KEY, a_ticket())
    tickets.verify(KEY, signed, now_unix_ns=NOW_NS + 999_999_999)
    refused(signed, "expired", now_unix_ns=NOW_NS + 1_000_000_000)


@pytest.mark.parametrize(
    "change",
    [{"reservation_id": ""}, {"sequence_id": ""}, {"prefix_digest": b"short"}, {"num_tokens": 0}, {"first_token": 11}],
)
def test_a_signed_ticket_that_makes_no_sense_is_malformed(change: dict[str, object]) -> None:
    ticket = a_ticket()
    for field, value in change.items():
        setattr(ticket, field, value)
    refused(tickets.issue(KEY, ticket), "malformed")


def test_signed_garbage_is_malformed() -> None:
    garbage = b"\xff\xff\xff"
    refused(SignedTicket(ticket=garbage, signature=hmac.digest(KEY, garbage, "sha256")), "malformed")
    uneven = a_ticket()
    uneven.block_generations.append(1)
    refused(tickets.issue(KEY, uneven), "malformed")


def check(ticket: Ticket, **changes: object) -> None:
    ours: dict[str, object] = {
        "identity": IDENTITY,
        "target_ranks": [RankMemory(RankKV.whole(LAYOUT))],
        "producer_id": "p0",
        "producer_epoch": 7,
        "computed_prefix_digest": tickets.prefix_digest(IDENTITY, TOKENS),
    }
    tickets.check_sender(ticket, **(ours | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"identity": ModelIdentity(model_id="smollm2", revision="abd", compute_dtype="float32")}, "identity"),
        ({"target_ranks": [RankMemory(RankKV.whole(KVLayout(2, 2, 8, 8, Dtype.FLOAT32)))]}, "kv_layout_id"),
        ({"target_ranks": [RankMemory(RankKV.whole(LAYOUT), offset_bytes=4096)]}, "kv_layout_id"),
        ({"target_ranks": [RankMemory(RankKV.whole(LAYOUT), group=1)]}, "kv_layout_id"),
        ({"producer_id": "p1"}, "producer_id"),
        ({"producer_epoch": 8}, "producer_epoch"),
        ({"computed_prefix_digest": tickets.prefix_digest(IDENTITY, [*TOKENS[:-1], 11])}, "prefix_digest"),
    ],
)
def test_the_sender_refuses_what_is_not_for_it(changes: dict[str, object], cause: str) -> None:
    check(a_ticket())
    with pytest.raises(TicketRefused) as caught:
        check(a_ticket(), **changes)
    assert caught.value.details["cause"] == cause


def test_the_sender_refuses_too_few_blocks() -> None:
    ticket = a_ticket()
    del ticket.block_ids[-1]
    with pytest.raises(TicketRefused, match="do not hold"):
        check(ticket)


def test_prefix_digests_differ_with_every_part() -> None:
    identities = [
        IDENTITY,
        ModelIdentity(model_id="smollm2a", revision="bc", compute_dtype="float32"),  # the same bytes, cut elsewhere
        ModelIdentity(model_id="smollm2", revision="abc", adapter="float32"),
        ModelIdentity(model_id="smollm2", revision="abc", compute_dtype="bfloat16"),
    ]
    prefixes: list[list[int]] = [[], [0], [0, 0], [1], [1 << 24], [2**32 - 1], TOKENS]
    digests = {tickets.prefix_digest(*pair) for pair in itertools.product(identities, prefixes)}
    assert len(digests) == len(identities) * len(prefixes)
    assert tickets.prefix_digest(IDENTITY, tuple(TOKENS)) == tickets.prefix_digest(IDENTITY, TOKENS)


def test_prefix_digest_is_what_its_docstring_says() -> None:
    hasher = hashlib.blake2b(digest_size=32, person=b"legato-prefix")
    for word in ("smollm2", "abc", "", "float32"):
        hasher.update(len(word).to_bytes(8, "little") + word.encode())
    hasher.update(b"".join(token.to_bytes(4, "little") for token in TOKENS))
    assert tickets.prefix_digest(IDENTITY, TOKENS) == hasher.digest()
