"""One request through real gRPC servers, with every fault a worker can have: the answer is the one without the fault,
its indices run from 0 without gap or repeat, and afterwards nobody holds anything."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from legato.v1 import common_pb2, inference_pb2
from router.journey import MAX_ATTEMPTS
from service.status import error_from_rpc
from spec.errors import (
    DeadlineExceeded,
    DigestMismatch,
    InternalError,
    LegatoError,
    NoWorkers,
    Overloaded,
    TransferFailed,
    WorkerLost,
)
from tests.router.toy_cluster import EOS, ToyDecode, ToyPrefill, ToyRouter, whole_answer

PROMPT = [104, 101, 108, 108, 111, 7, 42]


def options(max_tokens: int = 30, seed: int = 5, **more: object) -> inference_pb2.AnswerOptions:
    sampling = {key: more.pop(key) for key in list(more) if key in common_pb2.SamplingParams.DESCRIPTOR.fields_by_name}
    params = common_pb2.SamplingParams(
        max_tokens=max_tokens, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=seed, **sampling
    )
    return inference_pb2.AnswerOptions(sampling=params, **more)


def request(prompt: list[int] = PROMPT, **more: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=prompt), options=options(**more))


class Read:
    """What a client has of a stream; checks the indices while it reads."""

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        self.request = request
        resume = [list(tokens.ids) for tokens in request.options.resume]
        self.tokens: dict[int, list[int]] = dict(enumerate(resume))
        self.text: dict[int, str] = {}
        self.finished: dict[int, inference_pb2.GenerateResponse.Finished] = {}
        self.pieces: list[inference_pb2.GenerateResponse.Piece] = []

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        if response.HasField("piece"):
            piece = response.piece
            tokens = self.tokens.setdefault(piece.choice, [])
            assert piece.first_index == len(tokens), "a gap or a repeat"
            assert piece.choice not in self.finished
            tokens.extend(token.token_id for token in piece.tokens)
            self.text[piece.choice] = self.text.get(piece.choice, "") + piece.text
            self.pieces.append(piece)
        if response.HasField("finished"):
            assert response.finished.choice not in self.finished
            self.finished[response.finished.choice] = response.finished
            self.text[response.finished.choice] = self.text.get(response.finished.choice, "") + response.finished.text

    @property
    def expected(self) -> list[int]:
        return whole_answer(list(self.request.token_ids.ids), self.request.options.sampling)


async def ask(
    router: ToyRouter, asked: inference_pb2.GenerateRequest | None = None, timeout_s: float | None = 20.0
) -> Read:
    asked = asked or request()
    read = Read(asked)
    try:
        async for response in router.stub.Generate(asked, timeout=timeout_s):
            read.take(response)
    except grpc.aio.AioRpcError as rpc_error:
        raise error_from_rpc(rpc_error) from None
    return read


async def two_pools(router: ToyRouter, prefills: int = 2, decodes: int = 2) -> tuple[list[ToyPrefill], list[ToyDecode]]:
    pools = [ToyPrefill(f"p{i}") for i in range(prefills)], [ToyDecode(f"d{i}") for i in range(decodes)]
    await router.join(*pools[0], *pools[1])
    return pools


async def test_an_answer_without_faults(router: ToyRouter) -> None:
    await two_pools(router)
    read = await ask(router)
    assert read.tokens[0] == read.expected
    finished = read.finished[0]
    assert finished.route.attempts == 1
    assert (finished.route.prefill_worker_id, finished.route.decode_worker_id) == ("p0", "d0")
    assert finished.route.transfer.sent_tokens == len(PROMPT)
    assert finished.usage.prompt_tokens == len(PROMPT)
    assert finished.usage.completion_tokens == len(read.expected)
    names = [field.name for field in common_pb2.StageTimes.DESCRIPTOR.fields]
    times = [getattr(finished.stages, name) for name in names]
    assert times == sorted(times)
    assert times[0] > 0
    assert read.pieces[0].stages.first_token_ns == times[3]
    assert read.pieces[0].stages.second_token_ns == 0
    assert read.pieces[1].stages.second_token_ns == times[6]
    await router.at_rest()


async def test_sixty_at_once_are_each_right(router: ToyRouter) -> None:
    await two_pools(router)
    reads = await asyncio.gather(
        *(ask(router, request([i, i + 1, i + 2], seed=i, max_tokens=1 + i % 23)) for i in range(60))
    )
    assert all(read.tokens[0] == read.expected for read in reads)
    await router.at_rest()


async def test_one_token_needs_no_decode_worker(router: ToyRouter) -> None:
    await two_pools(router, prefills=1, decodes=1)
    read = await ask(router, request(max_tokens=1))
    assert read.tokens[0] == read.expected
    assert read.finished[0].route.decode_worker_id == ""
    assert read.finished[0].reason == common_pb2.FINISH_REASON_LENGTH
    await router.at_rest()


async def test_the_first_token_may_end_the_answer(router: ToyRouter) -> None:
    _, decodes = await two_pools(router, decodes=1)
    seed = next(seed for seed in range(1000) if whole_answer(PROMPT, options(seed=seed).sampling) == [EOS])
    read = await ask(router, request(seed=seed))
    assert read.tokens[0] == [EOS]
    assert read.finished[0].reason == common_pb2.FINISH_REASON_STOP
    assert read.text[0] == ""
    await router.at_rest()
    assert not decodes[0].sequences


@pytest.mark.parametrize(
    "fault",
    ["error_before_first_once", "error_after_first_once", "handoff_error_once", "die_before_first", "die_after_first"],
)
async def test_a_prefill_worker_fails(router: ToyRouter, fault: str) -> None:
    prefills, _ = await two_pools(router)
    error = TransferFailed("planted") if fault == "handoff_error_once" else WorkerLost("planted")
    setattr(prefills[0].faults, fault, True if fault.startswith("die") else error)
    read = await ask(router)
    assert read.tokens[0] == read.expected
    assert read.finished[0].route.attempts == 2
    assert read.finished[0].route.prefill_worker_id == "p1"
    assert read.finished[0].route.decode_worker_id == "d0", "it has kept what had landed"
    await router.at_rest()


async def test_the_client_hears_the_prefill_workers_own_error(router: ToyRouter) -> None:
    """And not that the decode worker saw the hand-over end, which is known sooner."""
    prefills, _ = await two_pools(router)
    prefills[0].faults.handoff_error_once = InternalError("planted")
    prefills[0].faults.handoff_error_delay_s = 0.1
    with pytest.raises(InternalError, match="planted"):
        await ask(router)
    await router.at_rest()


async def test_where_nobody_else_can_prefill_another_decode_worker_is_tried(router: ToyRouter) -> None:
    """It may be the link between these two that is broken."""
    prefills, _ = await two_pools(router, prefills=1)
    prefills[0].faults.handoff_error_once = TransferFailed("planted")
    read = await ask(router)
    assert read.tokens[0] == read.expected
    route = read.finished[0].route
    assert (route.attempts, route.prefill_worker_id, route.decode_worker_id) == (2, "p0", "d1")
    await router.at_rest()


async def test_a_decode_worker_is_kept_to_once(router: ToyRouter) -> None:
    prefills, _ = await two_pools(router, prefills=3)
    for prefill in prefills[:2]:
        prefill.faults.handoff_error_once = TransferFailed("planted")
    read = await ask(router)
    assert read.tokens[0] == read.expected
    route = read.finished[0].route
    assert (route.attempts, route.prefill_worker_id, route.decode_worker_id) == (3, "p2", "d1")
    await router.at_rest()


@pytest.mark.parametrize("tokens", [1, 2, 9])
async def test_a_decode_worker_dies_in_the_middle_of_many(router: ToyRouter, tokens: int) -> None:
    _, decodes = await two_pools(router)
    decodes[0].faults.die_after_tokens = tokens
    asked = [request([i, 3], seed=i, max_tokens=25, ignore_eos=True) for i in range(8)]
    reads = await asyncio.gather(*(ask(router, each) for each in asked))
    assert all(read.tokens[0] == read.expected for read in reads)
    assert any(read.finished[0].route.attempts == 2 for read in reads)
    assert all(read.finished[0].route.decode_worker_id == "d1" for read in reads if read.finished[0].route.attempts > 1)
    await router.at_rest()


async def test_a_decode_worker_ends_a_sequence_with_an_error(router: ToyRouter) -> None:
    _, decodes = await two_pools(router)
    decodes[0].faults.error_after_tokens_once = (4, DigestMismatch("planted"))
    read = await ask(router)
    assert read.tokens[0] == read.expected
    assert read.finished[0].route.attempts == 2
    await router.at_rest()


async def test_a_defect_is_not_tried_elsewhere(router: ToyRouter) -> None:
    _, decodes = await two_pools(router)
    decodes[0].faults.error_after_tokens_once = (4, InternalError("planted"))
    with pytest.raises(InternalError, match="planted"):
        await ask(router)
    await router.at_rest()


async def test_after_three_attempts_the_error_is_the_answer(router: ToyRouter) -> None:
    prefills, _ = await two_pools(router, prefills=3)
    for prefill in prefills:
        prefill.faults.error_after_first_once = TransferFailed("planted")
    with pytest.raises(TransferFailed, match="planted"):
        await ask(router)
    assert MAX_ATTEMPTS == 3
    await router.at_rest()


async def test_what_is_said_twice_is_heard_once(router: ToyRouter) -> None:
    _, decodes = await two_pools(router)
    for decode in decodes:
        decode.faults.say_twice = True
    read = await ask(router)
    assert read.tokens[0] == read.expected
    await router.at_rest()


async def test_a_refused_reservation_goes_to_the_next_worker(router: ToyRouter) -> None:
    _, decodes = await two_pools(router)
    decodes[0].faults.refuse_reserve = True
    read = await ask(router)
    assert read.finished[0].route.decode_worker_id == "d1"
    assert read.finished[0].route.attempts == 1
    await router.at_rest()


async def test_requests_wait_for_blocks_and_hold_none_meanwhile(router: ToyRouter) -> None:
    """The decode worker has blocks for two of these at a time."""
    decode = ToyDecode("d0", total_blocks=20)
    await router.join(ToyPrefill("p0"), decode)
    asked = [request([i], seed=i, max_tokens=35, ignore_eos=True) for i in range(7)]
    reads = await asyncio.gather(*(ask(router, each) for each in asked))
    assert all(read.tokens[0] == read.expected for read in reads)
    assert decode.most_sequences <= 2
    await router.at_rest()


async def test_the_line_is_bounded_and_the_deadline_ends_the_wait(router: ToyRouter) -> None:
    _, decodes = await two_pools(router, decodes=1)
    decodes[0].faults.refuse_reserve = True
    router.line._max_waiting = 3
    begun_s = time.monotonic()
    outcomes = await asyncio.gather(*(ask(router, timeout_s=0.6) for _ in range(5)), return_exceptions=True)
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds.count(Overloaded) == 2
    assert kinds.count(DeadlineExceeded) == 3, kinds
    assert time.monotonic() - begun_s < 5
    typed = [o for o in outcomes if isinstance(o, DeadlineExceeded)]
    assert all("room" in error.message for error in typed), "the router's own error, not the client's clock"
    await router.at_rest()


async def test_a_deadline_ends_a_stream_that_stalls(router: ToyRouter) -> None:
    _, decodes = await two_pools(router, decodes=1)
    decodes[0].faults.silent = True
    with pytest.raises(DeadlineExceeded, match="after 1 tokens"):
        await ask(router, request(ignore_eos=True), timeout_s=0.6)
    await router.at_rest()


@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_client_that_leaves_leaves_nothing(router: ToyRouter, after: int) -> None:
    prefills, decodes = await two_pools(router, prefills=1, decodes=1)
    if after == 0:
        prefills[0].faults.prefill_delay_s = 5.0
    call = router.stub.Generate(request(max_tokens=300, ignore_eos=True))
    for _ in range(after):
        assert (await call.read()).HasField("piece")
    if after == 0:
        await router.until(lambda: prefills[0].calls == 1)
    call.cancel()
    await router.at_rest()
    assert not decodes[0].sequences
    assert prefills[0].calls == 0


async def test_a_worker_that_restarts_on_its_address_is_a_new_one(router: ToyRouter) -> None:
    _, decodes = await two_pools(router, decodes=1)
    decodes[0].faults.silent = True
    asking = asyncio.create_task(ask(router, request(ignore_eos=True)))
    await router.until(lambda: decodes[0].sequences)
    again = ToyDecode("d0")
    await decodes[0].kill()
    await again.start()
    router.workers = [w for w in router.workers if w is not decodes[0]] + [again]
    router.apply()
    read = await asking
    assert read.tokens[0] == read.expected
    assert read.finished[0].route.attempts == 2
    await router.at_rest()


async def test_a_worker_missing_in_redis_stays_while_it_answers(router: ToyRouter) -> None:
    prefills, decodes = await two_pools(router)
    router.apply(decodes[0], decodes[1], prefills[0], prefills[1])
    read = await ask(router)
    assert read.finished[0].route.attempts == 1
    await decodes[0].kill()
    await router.until(lambda: "d0" not in router.registry.workers)
    assert set(router.registry.workers) == {"p0", "p1", "d1"}
    assert (await ask(router)).finished[0].route.decode_worker_id == "d1"
    router.apply(decodes[0])
    await router.at_rest()


async def test_a_draining_worker_gets_nothing_new_and_what_it_has_moves(router: ToyRouter) -> None:
    _, decodes = await two_pools(router)
    asking = asyncio.create_task(ask(router, request(max_tokens=200, ignore_eos=True)))
    await router.until(lambda: decodes[0].sequences)
    draining = type(decodes[0].record)()
    draining.CopyFrom(decodes[0].record)
    draining.draining = True
    decodes[0].record = draining
    router.apply()
    assert (await ask(router)).finished[0].route.decode_worker_id == "d1"
    read = await asking
    assert read.tokens[0] == read.expected
    assert read.finished[0].route.decode_worker_id == "d1"
    assert read.finished[0].route.attempts == 1
    await router.at_rest()


async def test_another_process_on_the_address_is_not_the_worker(router: ToyRouter) -> None:
    prefills, decodes = await two_pools(router, prefills=1, decodes=1)
    stale = type(decodes[0].record)()
    stale.CopyFrom(decodes[0].record)
    stale.epoch += 1000
    router.registry.apply({"p0": prefills[0].record, "d0": stale})
    await asyncio.sleep(0.2)
    assert not router.registry.workers["d0"].linked
    assert not router.registry.serves()


async def test_without_prefill_workers_decode_prefills(router: ToyRouter) -> None:
    prefills, _ = await two_pools(router, prefills=1)
    await prefills[0].kill()
    await router.until(lambda: not router.registry.workers["p0"].linked)
    read = await ask(router)
    assert read.tokens[0] == read.expected
    route = read.finished[0].route
    assert (route.prefill_worker_id, route.transfer.transport) == ("", "")
    stages = read.finished[0].stages
    assert 0 < stages.first_token_ns <= stages.handed_over_ns <= stages.second_token_ns
    await router.at_rest()


async def test_an_empty_pool_is_said_after_its_grace(router: ToyRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.placer.EMPTY_POOL_GRACE_S", 0.3)
    _, decodes = await two_pools(router, decodes=1)
    await decodes[0].kill()
    await router.until(lambda: not router.registry.workers["d0"].linked)
    with pytest.raises(NoWorkers, match="no decode worker"):
        await ask(router)
    await router.at_rest()


async def test_a_client_resumes_where_its_router_died(router: ToyRouter) -> None:
    await two_pools(router)
    whole = await ask(router, request(ignore_eos=True))
    for have in (1, 7, 29, 30):
        tokens = inference_pb2.TokenIds(ids=whole.tokens[0][:have])
        rest = await ask(router, request(ignore_eos=True, resume=[tokens]))
        assert rest.tokens[0] == whole.tokens[0]
        assert rest.finished[0].usage.completion_tokens == 30
        before = await ask(router, request(ignore_eos=True, max_tokens=have)) if have < 30 else None
        if before is not None:
            held = before.finished[0].text
            assert before.text[0].removesuffix(held) + rest.text[0] == whole.text[0]
    await router.at_rest()


async def test_several_answers_have_their_own_seeds_and_wait_for_the_first(router: ToyRouter) -> None:
    prefills, _ = await two_pools(router, prefills=1)
    asked = request(n=3, seed=(1 << 64) - 2, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    read = await ask(router, asked)
    for choice, seed in enumerate([(1 << 64) - 2, (1 << 64) - 1, 0]):
        assert read.tokens[choice] == whole_answer(PROMPT, options(max_tokens=12, seed=seed, ignore_eos=True).sampling)
    assert read.pieces[0].choice == 0
    with_logprobs = [piece for piece in read.pieces if piece.prompt_logprobs]
    assert with_logprobs == [read.pieces[0]]
    assert [entry.logprob for entry in read.pieces[0].prompt_logprobs] == [-float(i) for i in PROMPT[1:]]
    prefills[0].faults.error_before_first_once = InternalError("planted")
    with pytest.raises(LegatoError, match="planted"):
        await ask(router, asked)
    await router.at_rest()
