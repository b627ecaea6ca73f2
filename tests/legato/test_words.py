"""What needs no server: errors, requests, retries, the ledger's arithmetic, and how light the import is."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import subprocess
import sys

import numpy
import pytest

import legato
import spec.errors
import spec.sampling
from legato import _request, errors, types
from legato._ledger import ledger_of
from legato._retry import Backoff
from legato.v1 import common_pb2

CLIENT_ONLY = {"UNREACHABLE"}
LATER_THAN_A_REQUEST = {"TICKET_REFUSED", "DIGEST_MISMATCH", "TRANSFER_FAILED", "TRANSPORT_UNAVAILABLE"} | {
    "WIRE_MISMATCH",
    *("INVALID_MODEL", "UNSUPPORTED_MODEL", "INVALID_CONFIGURATION", "ERROR_REASON_UNSPECIFIED"),
}


def _classes():
    return {name: one for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, Exception)}


def test_all_is_the_truth_and_the_drawing_too():
    assert sorted(_classes()) == errors.__all__
    for name in errors.__all__:
        assert name in (errors.__doc__ or "").split(), name


def test_reasons_are_those_of_the_wire():
    leaves = {one.reason for one in _classes().values()}
    assert leaves - CLIENT_ONLY == set(common_pb2.ErrorReason.keys()) - LATER_THAN_A_REQUEST
    assert set(errors.BY_REASON) == leaves - CLIENT_ONLY
    for reason, ours in errors.BY_REASON.items():
        theirs = spec.errors.BY_REASON[reason]
        assert (ours.__name__, ours.retryable) == (theirs.__name__, theirs.retryable)
        assert [base.__name__ for base in ours.__mro__[1:-3]] == [base.__name__ for base in theirs.__mro__[1:-3]]


def test_grpcs_own_log_is_not_for_the_users_terminal_unless_asked_for():
    code = "import os, legato; before = os.environ.get('GRPC_VERBOSITY'); legato.Client; "
    code += "print(before, os.environ['GRPC_VERBOSITY'])"
    bare = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    for given, said in (({}, "None ERROR"), ({"GRPC_VERBOSITY": "DEBUG"}, "DEBUG DEBUG")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare | given
        )
        assert done.stdout.strip() == said


def test_import_is_light_and_names_are_real():
    code = "import sys, legato, legato.types, legato.errors; assert not {'grpc', 'torch', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in legato.__all__:
        assert getattr(legato, name).__name__ == name
    with pytest.raises(AttributeError):
        legato.Clinet  # noqa: B018


def test_options_are_one_list_with_the_defaults_of_the_engine():
    given = inspect.signature(_request.answer_options).parameters
    assert set(given) == set(_request.Sampling.__annotations__)
    defaults = spec.sampling.SamplingParams()
    for name in (
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "ignore_eos",
        "logprobs",
    ):
        assert given[name].default == getattr(defaults, name), name
    for verb in (legato.Client.stream, legato.Client.chat):
        assert set(given) < set(inspect.signature(verb).parameters)
        assert all(f"{name} " in verb.__doc__ for name in given)


@pytest.mark.parametrize("kind", [legato.Client, legato.AsyncClient])
@pytest.mark.parametrize("verb", ["stream", "generate", "stream_chat", "chat"])
def test_a_misspelt_option_names_the_verb_and_the_nearest_known(kind, verb):
    async def call():
        given = getattr(kind("localhost:1"), verb)("x", temprature=0.1)
        return await given if inspect.isawaitable(given) else given

    with pytest.raises(TypeError) as caught:
        asyncio.run(call())
    assert str(caught.value) == f"{kind.__name__}.{verb}() has no option 'temprature'; did you mean 'temperature'?"
    assert inspect.iscoroutinefunction(getattr(legato.AsyncClient, verb)) == (not verb.startswith("stream"))


def test_what_is_refused_here_says_what_is_wanted():
    none = _request.answer_options()
    wanted = {
        "prompt must be text or a list of token ids, is None": lambda: _request.generate_request(None, "", none),
        "prompt must be text or a list of token ids, is b'abc'": lambda: _request.generate_request(b"abc", "", none),
        "text must be text or a list of messages, is None": lambda: _request.tokenize_request(None, ""),
        "max_tokens must be at least 1, is -1": lambda: _request.answer_options(max_tokens=-1),
        "top_k must be at least 0, is -1": lambda: _request.answer_options(top_k=-1),
        "seed must be at most 18446744073709551615, is": lambda: _request.answer_options(seed=2**64),
        "temperature must be at most 3.4e38, is 1e+300": lambda: _request.answer_options(temperature=1e300),
        "top_p must be at most 3.4e38, is": lambda: _request.answer_options(top_p=10**400),
        "top_k must be at most 4294967295, is a very large int": lambda: _request.answer_options(top_k=10**5000),
        "speculation must be one of prompt_lookup, draft_model, is 'lookup'": lambda: _request.answer_options(
            speculation="lookup"
        ),
        "num_draft_tokens must be at least 1, is -2": lambda: _request.answer_options(
            speculation="draft_model", num_draft_tokens=-2
        ),
        "regex cannot be asked for together with json_schema": lambda: _request.answer_options(
            json_schema={}, regex="a"
        ),
        "json_schema is nothing that JSON can say: Object of type": lambda: _request.answer_options(
            json_schema={"const": b"a"}
        ),
        "choice must be a list of texts, is 'yes'": lambda: _request.answer_options(choice="yes"),
        "choice must be text, is 3": lambda: _request.answer_options(choice=["yes", 3]),
        "grammar must be text, is ['a']": lambda: _request.answer_options(grammar=["a"]),
        "temperature must be a number, is array": lambda: _request.answer_options(temperature=numpy.ones(3)),
        "logit_bias must be at least -3.4e38, is": lambda: _request.answer_options(logit_bias={1: -1e300}),
        "timeout_s must be a finite number of seconds above 0, is inf": lambda: legato.Client(
            "a:1", timeout_s=float("inf")
        ),
        "api_key must be printable ASCII": lambda: legato.Client("a:1", api_key="a\nb"),
    }
    for said, build in wanted.items():
        with pytest.raises(errors.InvalidParameter) as caught:
            build()
        assert str(caught.value).startswith(said)


def test_constraints_go_out_as_they_are():
    said = lambda **options: _request.answer_options(**options).sampling.constraint  # noqa: E731
    assert said(json_schema={"type": "object"}).json_schema == '{"type": "object"}'
    assert said(json_schema=True).json_schema == "true"
    assert said(json_schema='{"const": 1.50}').json_schema == '{"const": 1.50}', "a text is sent as it is"
    assert said(regex="").WhichOneof("kind") == "regex", "an empty one is one, too"
    assert list(said(choice=iter(["a", "b"])).choice.texts) == ["a", "b"]
    assert said(choice=[]).WhichOneof("kind") == "choice"
    assert said(grammar="start: A").grammar == "start: A"
    assert not _request.answer_options().sampling.HasField("constraint")


def test_a_requests_name_cannot_break_the_line_of_its_error():
    assert str(errors.WorkerLost("it is gone", request_id="a\nb\x1b[31m")) == "it is gone (request 'a\\nb\\x1b[31m')"
    assert len(str(errors.WorkerLost("it is gone", request_id="a" * 10_000))) < 200


@pytest.mark.parametrize(
    ("field", "build"),
    [
        ("prompt", lambda: _request.generate_request("\ud800", "", _request.answer_options())),
        ("prompt", lambda: _request.generate_request([1, -2], "", _request.answer_options())),
        ("prompt", lambda: _request.generate_request([1, 2.5], "", _request.answer_options())),
        ("prompt", lambda: _request.generate_request(b"bytes", "", _request.answer_options())),
        ("stop", lambda: _request.answer_options(stop=["ok", "\udfff"])),
        ("stop", lambda: _request.answer_options(stop=3)),
        ("max_tokens", lambda: _request.answer_options(max_tokens=-1)),
        ("max_tokens", lambda: _request.answer_options(max_tokens=True)),
        ("max_tokens", lambda: _request.answer_options(max_tokens=2**32)),
        ("temperature", lambda: _request.answer_options(temperature="hot")),
        ("seed", lambda: _request.answer_options(seed=-1)),
        ("n", lambda: _request.answer_options(n=0)),
        ("logit_bias", lambda: _request.answer_options(logit_bias={-1: 1.0})),
        ("messages", lambda: _request.chat_messages("hi")),
        ("messages", lambda: _request.chat_messages([{"role": "user"}])),
        (
            "messages[1].content",
            lambda: _request.chat_messages([{"role": "a", "content": "b"}, {"role": "a", "content": 1}]),
        ),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_by_name(field, build):
    with pytest.raises(errors.InvalidParameter) as caught:
        build()
    assert caught.value.details["field"] == field


def test_what_the_wire_can_carry_is_left_to_the_cluster():
    options = _request.answer_options(max_tokens=0, temperature=float("nan"), top_p=numpy.float32(0.5))
    assert options.sampling.temperature != options.sampling.temperature
    empty = _request.generate_request(numpy.array([], dtype=numpy.int64), "", options)
    assert empty.WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    "address",
    [
        *("", "localhost", "localhost:", "localhost:0", "a:1,b", "a:x", "a:²", ":1", 5, None),
        *("http://localhost:1", "//localhost:1", "a b:1", "user@a:1", "a/b:1", "::1:1", "[::1:1", "::1]:1"),
    ],
)
def test_addresses(address):
    with pytest.raises(errors.InvalidParameter, match=r"^address must be HOST:PORT") as caught:
        legato.Client(address)
    assert caught.value.details == {"field": "address"}


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:1", "[::1]:1", "[fe80::1%eth0]:1", "a-b.c_d:65535, b:2"])
def test_addresses_that_are(address):
    legato.Client(address).close()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), True, "5"])
def test_timeouts(timeout_s):
    with pytest.raises(errors.InvalidParameter):
        legato.Client("localhost:1", timeout_s=timeout_s)


def test_backoff_doubles_with_jitter_and_respects_the_deadline():
    lost = errors.WorkerLost("lost")
    backoff = Backoff(legato.Retries(attempts=9, first_delay_s=1, max_delay_s=4), 2, 100.0, random.Random(1))
    delays = [backoff.delay_after_s(lost, 0.0, False) for _ in range(6)]
    assert delays[0] == 0.0  # the other address, at once
    for delay, longest in zip(delays[1:], [1, 2, 4, 4, 4], strict=True):
        assert longest / 2 <= delay <= longest
    assert len(set(delays)) == 6
    with pytest.raises(errors.WorkerLost):
        backoff.delay_after_s(lost, 99.0, False)
    other = Backoff(legato.Retries(attempts=2), 1, 100.0)
    other.delay_after_s(errors.Draining("it is stopping"), 0.0, True)
    with pytest.raises(errors.Unreachable) as caught:
        other.delay_after_s(errors.Unreachable("nobody answers"), 0.0, False)
    assert str(caught.value) == "nobody answers; first it failed because it is stopping (DRAINING)"
    assert caught.value.details == {"first_reason": "DRAINING"}
    assert isinstance(caught.value.__cause__, errors.Draining)
    for final in (errors.InternalError("x"), errors.DeadlineExceeded("x"), errors.UnknownModel("x")):
        with pytest.raises(type(final)):
            Backoff(legato.Retries(), 1, 100.0).delay_after_s(final, 0.0, False)


def test_ledger_by_hand():
    ms = 1_000_000
    sent = 1_700_000_000 * 10**9
    names = ("prefill_queued_ns", "prefill_started_ns", "first_token_ns", "handed_over_ns", "decode_started_ns")
    stages = {name: sent + at * ms for name, at in zip(names, (2, 5, 25, 31, 33), strict=True)}
    ledger = ledger_of(stages, sent, 26 * ms, 40 * ms)
    assert [round(1e3 * one, 6) for one in ledger.stages_s.values()] == [2, 3, 20, 6, 2, 7]
    assert ledger.clock_shift_s == 0
    early = ledger_of(stages | {"handed_over_ns": sent + 20 * ms}, sent, 26 * ms, 40 * ms)
    assert (early.exposed_transfer_s, early.decode_queue_s, early.clock_shift_s) == (0, pytest.approx(0.008), 0)


def test_ledger_sums_whatever_the_clocks_say():
    generator = random.Random(7)
    names = ("prefill_queued_ns", "prefill_started_ns", "first_token_ns", "handed_over_ns", "decode_started_ns")
    for _ in range(300):
        sent = 10**18
        stages = {name: sent + generator.randint(-(10**9), 10**9) for name in names if generator.random() < 0.8}
        second = generator.randint(0, 10**9)
        ledger = ledger_of(stages, sent, second // 2, second)
        assert all(one >= 0 for one in ledger.stages_s.values())
        assert abs(ledger.total_s - second / 1e9) < 1e-6
        single = ledger_of(stages, sent, second, None)
        assert single.total_s <= second / 1e9 + 1e-9


def test_types_are_frozen_and_plain():
    for name, one in vars(types).items():
        if isinstance(one, type) and hasattr(one, "__dataclass_fields__"):
            assert one.__dataclass_params__.frozen, name
