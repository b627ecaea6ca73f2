"""The client against a real gRPC server: streaming, leaving, sending again, and the promise of the indices."""

from __future__ import annotations

import gc
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

import legato
from legato import errors

QUICK = legato.Retries(attempts=4, first_delay_s=0.01, max_delay_s=0.05)


@pytest.fixture
def client(router):
    with legato.Client(router.address, timeout_s=10, retries=QUICK) as client:
        yield client


def test_pieces_run_from_zero_and_make_the_answer(client, router, expected):
    stream = client.stream("abc", max_tokens=5, seed=3)
    pieces = list(stream)
    assert [piece.index for piece in pieces] == [0, 1, 2, 3, 4]
    assert [token for piece in pieces for token in piece.token_ids] == expected(3, 5)
    answer = stream.answer
    assert answer.text == "".join(piece.text for piece in pieces)
    assert (answer.finish_reason, answer.seed, answer.model) == ("length", 3, "toy")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 5, 8)
    assert (answer.route.prefill_worker_id, answer.route.decode_worker_id) == ("prefill-0", "decode-0")
    assert (answer.route.transfer.moved_bytes, answer.route.sends) == (64, 1)
    assert answer.request_id == router.toy.requests[0].options.request_id
    json.dumps(answer.to_dict())


def test_every_option_reaches_the_wire(client, router):
    client.generate(
        [1, 2],
        max_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.75,
        frequency_penalty=-0.5,
        logit_bias={4: -1.5},
        seed=2**64 - 1,
        stop=["x", "yz"],
        stop_token_ids=[7],
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=2,
        forced_token_ids=[9],
        model="toy",
        request_id="mine",
    )
    request = router.toy.requests[0]
    sampling = request.options.sampling
    assert list(request.token_ids.ids) == [1, 2]
    assert (request.model, request.options.request_id, list(request.options.stop)) == ("toy", "mine", ["x", "yz"])
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 3, 0.25, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.75, -0.5)
    assert dict(sampling.logit_bias) == {4: -1.5}
    assert (sampling.seed, list(sampling.stop_token_ids), sampling.ignore_eos) == (2**64 - 1, [7], True)
    assert (sampling.logprobs, sampling.HasField("logprobs"), sampling.prompt_logprobs) == (0, True, 2)
    assert list(sampling.forced_token_ids) == [9]


def test_chat_choices_and_logprobs(client, expected):
    answer = client.chat([{"role": "user", "content": "hi"}], max_tokens=3, seed=1, n=2, logprobs=2, prompt_logprobs=0)
    assert [list(choice.token_ids) for choice in answer.choices] == [expected(1, 3), expected(2, 3)]
    assert answer.usage.completion_tokens == 6
    assert [one.token_id for one in answer.logprobs] == expected(1, 3)
    assert answer.logprobs[0].top == {0: -1.0, 1: -2.0}
    assert [(one.token_id, one.logprob) for one in answer.prompt_logprobs] == [(ord("i"), -ord("i"))]


def test_text_held_back_comes_last_without_tokens(client, router, script):
    router.toy.scripts.append(script(held_back="tail"))
    pieces = list(client.stream("abc", max_tokens=2))
    assert (pieces[-1].text, pieces[-1].token_ids, pieces[-1].index) == ("tail", (), 2)


@pytest.mark.parametrize("how", ["close", "with", "drop"])
def test_leaving_cancels(client, router, script, how):
    router.toy.scripts.append(script(hang_after_tokens=2))
    stream = client.stream("abc", max_tokens=5)
    assert next(stream).index == 0
    if how == "close":
        stream.close()
        assert list(stream) == []
        assert stream.answer.finish_reason is None
        assert len(stream.answer.token_ids) == 1
    elif how == "with":
        with stream:
            pass
    else:
        del stream
        gc.collect()
    assert router.toy.cancelled.wait(5)


def test_another_thread_may_close(client, router, script):
    router.toy.scripts.append(script(hang_after_tokens=1))
    stream = client.stream("abc", max_tokens=5)
    next(stream)
    threading.Timer(0.1, stream.close).start()
    with pytest.raises(errors.RequestCancelled):
        next(stream)
    assert router.toy.cancelled.wait(5)


def test_sent_again_before_the_first_token(client, router, script, expected):
    router.toy.scripts += [script(fail_after_tokens=0), script(fail_after_tokens=0, reason="NO_WORKERS")]
    answer = client.generate("abc", max_tokens=4, seed=2)
    assert list(answer.token_ids) == expected(2, 4)
    assert answer.route.sends == len(router.toy.requests) == 3
    assert len({request.options.request_id for request in router.toy.requests}) == 1
    assert not router.toy.requests[-1].options.resume


def test_resumes_behind_the_tokens_it_has_with_the_seed_that_drew_them(client, router, script, expected):
    router.toy.scripts += [script(fail_after_tokens=2), script(fail_after_tokens=3, reason="WORKER_LOST")]
    stream = client.stream("abc", max_tokens=8, n=2)  # no seed: the router draws 5
    pieces = list(stream)
    first = [piece for piece in pieces if piece.choice == 0]
    assert [piece.index for piece in first] == list(range(8))
    assert [list(choice.token_ids) for choice in stream.answer.choices] == [expected(5, 8), expected(6, 8)]
    again = router.toy.requests[1].options
    assert [list(one.ids) for one in again.resume] == [expected(5, 2), []]
    assert again.sampling.seed == 5
    assert len(router.toy.requests[2].options.resume[0].ids) == 5
    ledger = stream.answer.ledger
    assert abs(ledger.total_s - ledger.second_token_s) < 1e-6


def test_attempts_count_only_sends_without_a_new_token(client, router, script, expected):
    router.toy.scripts += [script(fail_after_tokens=1) for _ in range(9)]
    assert list(client.generate("abc", max_tokens=9).token_ids) == expected(5, 9)
    router.toy.requests.clear()
    router.toy.scripts += [script(fail_after_tokens=0) for _ in range(9)]
    with pytest.raises(errors.Unreachable):
        client.generate("abc")
    assert len(router.toy.requests) == QUICK.attempts


@pytest.mark.parametrize(("key", "at"), [("skip_index", 2), ("repeat_index", 2), ("no_finish", True)])
def test_a_broken_promise_is_an_internal_error(client, router, script, key, at):
    router.toy.scripts.append(script(**{key: at}))
    with pytest.raises(errors.InternalError) as caught:
        client.generate("abc", max_tokens=4, request_id="r7")
    assert caught.value.request_id == "r7"
    assert len(router.toy.requests) == 1


def test_the_next_router_takes_over(make_router, script, expected):
    first, second = make_router(), make_router()
    first.toy.scripts.append(script(hang_after_tokens=3))
    with legato.Client(f"{first.address},{second.address}", retries=QUICK, timeout_s=10) as client:
        stream = client.stream("abc", max_tokens=6, seed=4)
        got = [next(stream) for _ in range(3)]
        first.stop()
        got += list(stream)
        assert [piece.index for piece in got] == list(range(6))
        assert list(stream.answer.token_ids) == expected(4, 6)
        assert len(second.toy.requests) == 1
        assert client.tokenize("hi") == [104, 105]
        assert client.generate("abc", max_tokens=1).text
        assert len(second.toy.requests) == 3  # it stays where it was answered


def test_a_router_that_comes_back_is_found_again(router, script, expected):
    with legato.Client(router.address, timeout_s=10, retries=legato.Retries(first_delay_s=0.1)) as client:
        assert client.tokenize("a") == [97]
        router.stop()
        threading.Timer(0.3, router.start).start()
        assert list(client.generate("abc", max_tokens=3, seed=1).token_ids) == expected(1, 3)


def test_nobody_there_is_typed_and_names_the_address(make_router):
    gone = make_router()
    gone.stop()
    with legato.Client(gone.address, retries=QUICK) as client, pytest.raises(errors.Unreachable) as caught:
        client.models()
    assert gone.address in str(caught.value)
    assert caught.value.retryable


def test_what_ends_an_answer_brings_the_first_cause_and_what_there_is_of_it(make_router, script, expected):
    one = make_router()
    one.toy.scripts += [script(fail_after_tokens=3, reason="DRAINING"), script(fail_after_tokens=0)]
    one.toy.scripts += [script(fail_after_tokens=0)] * 3
    with legato.Client(one.address, retries=QUICK) as client:
        stream = client.stream("abc", max_tokens=6, seed=4, request_id="r5")
        with pytest.raises(errors.Unreachable) as caught:
            list(stream)
        one.toy.scripts += [script(fail_after_tokens=2, status=grpc.StatusCode.INTERNAL)]
        with pytest.raises(errors.InternalError) as whole:
            client.generate("abc", max_tokens=6, seed=4)
        one.stop()
        with pytest.raises(errors.Unreachable) as nothing:
            client.generate("abc")
        with pytest.raises(errors.Unreachable) as unary:
            client.models()
    error = caught.value
    assert "scripted DRAINING (DRAINING)" in str(error)
    assert "; 3 tokens of the answer had come (request r5)" in str(error)
    assert (error.details["first_reason"], error.details["tokens"]) == ("DRAINING", "3")
    assert isinstance(error.__cause__, errors.Draining)
    assert list(error.answer.token_ids) == expected(4, 3)
    assert error.answer.finish_reason is None
    assert error.answer == stream.answer
    assert list(whole.value.answer.token_ids) == expected(4, 2)
    assert "first_reason" not in whole.value.details
    assert nothing.value.answer.token_ids == ()
    assert "tokens" not in nothing.value.details
    assert "had come" not in str(nothing.value)
    assert unary.value.answer is None


def test_a_closed_client_says_so(client, router, script):
    router.toy.scripts.append(script(hang_after_tokens=1))
    stream = client.stream("abc", max_tokens=5)
    next(stream)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(errors.RequestCancelled, match="the client is closed") as caught:
        next(stream)
    assert caught.value.details["tokens"] == "1"
    client.close()
    for verb in (
        lambda: client.generate("abc"),
        lambda: client.stream("abc"),
        client.models,
        lambda: client.tokenize("a"),
    ):
        with pytest.raises(errors.RequestCancelled, match="the client is closed"):
            verb()
    assert len(router.toy.requests) == 1


def test_deadlines(client, router, script):
    router.toy.scripts += [script(hang_after_tokens=1), script(hang_after_tokens=0)]
    for _ in range(2):
        with pytest.raises(errors.DeadlineExceeded) as caught:
            client.generate("abc", max_tokens=5, timeout_s=0.2)
        assert caught.value.request_id
    assert len(router.toy.requests) == 2


@pytest.mark.parametrize("reason", ["INVALID_PARAMETER", "CONTEXT_TOO_LONG", "UNKNOWN_MODEL", "UNAUTHENTICATED"])
def test_the_callers_fault_is_not_sent_again(client, router, script, reason):
    info = {"field": "temperature", "retryable": "false", "fault": "client"}
    router.toy.scripts.append(
        script(fail_after_tokens=0, reason=reason, status=grpc.StatusCode.INVALID_ARGUMENT, info=info)
    )
    with pytest.raises(errors.BY_REASON[reason]) as caught:
        client.generate("abc", request_id="r1")
    error = caught.value
    assert isinstance(error, errors.RequestError)
    assert (error.reason, error.retryable, error.request_id) == (reason, False, "r1")
    assert error.details == {"field": "temperature"}
    assert len(router.toy.requests) == 1


def test_an_operators_reason_stays_readable(client, router, script):
    router.toy.scripts.append(
        script(
            fail_after_tokens=0,
            reason="INVALID_MODEL",
            status=grpc.StatusCode.FAILED_PRECONDITION,
            info={"retryable": "false"},
        )
    )
    with pytest.raises(errors.ClusterError) as caught:
        client.generate("abc")
    assert caught.value.reason == "INVALID_MODEL"


def test_a_server_that_is_no_router_says_so(router):

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with legato.Client(f"127.0.0.1:{port}", retries=QUICK) as client, pytest.raises(errors.InternalError) as caught:
            client.generate("abc")
        assert "legato.v1" in str(caught.value)
    finally:
        server.stop(None)


def test_the_ledger_sums_to_what_the_client_measured(client, router, script):
    router.toy.scripts.append(script(delay_s=0.05))
    started = time.monotonic()
    stream = client.stream("abc", max_tokens=3)
    next(stream)
    first = time.monotonic() - started
    next(stream)
    second = time.monotonic() - started
    list(stream)
    ledger = stream.answer.ledger
    assert list(ledger.stages_s) == [
        *("route", "queue", "prefill"),
        *("exposed transfer", "decode queue", "first decode step"),
    ]
    assert ledger.total_s == pytest.approx(ledger.second_token_s, abs=1e-6)
    assert ledger.second_token_s == pytest.approx(second, abs=0.02)
    assert ledger.ttft_s == pytest.approx(first, abs=0.02)
    assert 0.05 <= ledger.first_decode_step_s < ledger.second_token_s
    one = client.generate("abc", max_tokens=1).ledger
    assert list(one.stages_s) == ["route", "queue", "prefill"]
    assert one.second_token_s is None
    assert one.total_s <= one.ttft_s


def test_api_key_and_trace_context_travel(router):
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry import trace as api
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("legato._rpc._TRACER", provider.get_tracer("test"))
        with legato.Client(router.address, api_key="secret") as client:
            client.generate("abc", max_tokens=2, request_id="r9")
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.attributes["legato.request_id"], span.attributes["legato.output_tokens"]) == (
        "legato.client",
        "r9",
        2,
    )
    seen = router.toy.metadata[0]
    assert seen["authorization"] == "Bearer secret"
    assert seen["traceparent"].split("-")[1] == api.format_trace_id(span.context.trace_id)


def test_models_cluster_and_text(client):
    assert client.models() == [legato.Model("toy", "r1", 99, 26, False, (legato.Adapter("poems", "0123456789"),))]
    cluster = client.cluster()
    assert (cluster.router_id, cluster.finished_requests, cluster.ttft_s.p90) == ("toy-router", 3, 0.2)
    assert (cluster.workers[0].worker_id, cluster.workers[0].free_blocks) == ("decode-0", 6)
    assert client.tokenize([{"role": "user", "content": "hi"}]) == [104, 105]
    assert client.detokenize([104, 105]) == "hi"


def test_unary_calls_are_sent_again(client, router, script):
    router.toy.scripts.append(script(fail_after_tokens=0, reason="DRAINING"))
    assert client.tokenize("hi") == [104, 105]
    assert len(router.toy.requests) == 2
