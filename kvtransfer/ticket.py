"""The ticket: what binds a reservation of decode's blocks to the content that may be written into them.

The decode worker issues it when it reserves, the prefill worker checks it before it sends, the decode worker verifies
it again before it lets a writer in. Signed with the cluster's key: HMAC-SHA256 (RFC 2104) over exactly the serialized
bytes that travel; nothing is ever serialized a second time to be compared.
"""

from __future__ import annotations

import array
import hashlib
import hmac
import sys
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from kvtransfer.routes import RankMemory, layout_id
from legato.v1.worker_pb2 import ModelIdentity, SignedTicket, Ticket
from spec.errors import TicketRefused

PREFIX_DIGEST_BYTES = 32


def prefix_digest(identity: ModelIdentity, token_ids: Sequence[int]) -> bytes:
    """BLAKE2b, 32 bytes, over the model's identity and the tokens whose KV is meant (uint32, little-endian).

    The lengths of the identity's bytes come first, so that no identity and prefix read like another pair."""
    hasher = hashlib.blake2b(digest_size=PREFIX_DIGEST_BYTES, person=b"legato-prefix")
    for word in (identity.model_id, identity.revision, identity.adapter, identity.compute_dtype):
        encoded = word.encode()
        hasher.update(len(encoded).to_bytes(8, "little") + encoded)
    tokens = array.array("I", token_ids)
    if sys.byteorder == "big":
        tokens.byteswap()
    hasher.update(tokens.tobytes())
    return hasher.digest()


def issue(key: bytes, ticket: Ticket) -> SignedTicket:
    serialized = ticket.SerializeToString(deterministic=True)
    return SignedTicket(ticket=serialized, signature=_signature(key, serialized))


def verify(key: bytes, signed: SignedTicket, *, now_unix_ns: int) -> Ticket:
    """The ticket inside. Raises TicketRefused, `cause` being forged, malformed or expired."""
    if not hmac.compare_digest(_signature(key, signed.ticket), signed.signature):
        raise TicketRefused("the ticket's signature does not match", cause="forged")
    try:
        ticket = Ticket.FromString(signed.ticket)
    except DecodeError:
        raise TicketRefused("the ticket cannot be read", cause="malformed") from None
    _check_form(ticket)
    if now_unix_ns >= ticket.expires_unix_ns:
        late_ms = (now_unix_ns - ticket.expires_unix_ns) / 1e6
        raise TicketRefused(f"the ticket expired {late_ms:.0f} ms ago", cause="expired")
    return ticket


def check_sender(
    ticket: Ticket,
    *,
    identity: ModelIdentity,
    target_ranks: Sequence[RankMemory],
    producer_id: str,
    producer_epoch: int,
    computed_prefix_digest: bytes,
) -> None:
    """What the producer checks before its first write. Raises TicketRefused, `cause` naming the field that differs.

    `target_ranks` are those for which it plans (the reservation's); `computed_prefix_digest` is prefix_digest()
    of its own identity and of the tokens that it computed."""
    expected: dict[str, tuple[object, object]] = {
        "identity": (ticket.identity, identity),
        "kv_layout_id": (ticket.kv_layout_id, layout_id(target_ranks)),
        "producer_id": (ticket.producer_id, producer_id),
        "producer_epoch": (ticket.producer_epoch, producer_epoch),
    }
    for field, (theirs, ours) in expected.items():
        if theirs != ours:
            raise TicketRefused(
                f"the ticket's {field} is {theirs}, this worker's is {ours}".replace("\n", " "), cause=field
            )
    if not hmac.compare_digest(ticket.prefix_digest, computed_prefix_digest):
        raise TicketRefused("the ticket is for other tokens than those computed here", cause="prefix_digest")
    if len(ticket.block_ids) < target_ranks[0].kv.layout.blocks_for(ticket.num_tokens):
        raise TicketRefused(
            f"the ticket's {len(ticket.block_ids)} blocks do not hold {ticket.num_tokens} tokens", cause="block_ids"
        )


def _check_form(ticket: Ticket) -> None:
    wrong = {
        "reservation_id": not ticket.reservation_id,
        "sequence_id": not ticket.sequence_id,
        "prefix_digest": len(ticket.prefix_digest) != PREFIX_DIGEST_BYTES,
        "num_tokens": ticket.num_tokens == 0,
        "first_token": ticket.first_token > ticket.num_tokens,
        "block_generations": len(ticket.block_generations) != len(ticket.block_ids),
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            raise TicketRefused(f"the ticket's {field} cannot be right", cause="malformed", field=field)


def _signature(key: bytes, serialized: bytes) -> bytes:
    if not key:
        raise TicketRefused("this worker has no cluster key", cause="no_key")
    return hmac.digest(key, serialized, "sha256")
