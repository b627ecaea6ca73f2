"""Speculation on a real model: answers are bit for bit those without it, and a draft model that is the model itself
guesses right every time, which it could not with a wrong token, position or KV entry anywhere."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ranked_engine
from tiny_llama import SHAPES, make_llama

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.sampling import draw
from engine.speculation import DraftModel, check_draft, draws_of, verified
from scheduler.batch import Scheduler, SchedulerConfig, Tokens
from scheduler.plan import NO_TOKEN, Draw, Drawn, Executor, Proposal, Slice, StepPlan
from scheduler.sequence import Sequence
from spec.errors import InvalidConfiguration
from spec.layout import ParallelLayout
from spec.sampling import SamplingParams, Speculation

BLOCKS, BLOCK_TOKENS = 60, 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model, and another of the same vocabulary."""
    made = [make_llama(tmp_path_factory.mktemp("model"), SHAPES[place], seed=place) for place in (0, 1)]
    return made[0], made[1]


def make_engine(folder: Path, draft: Path | None = None, dtype: str = "float32") -> Engine:
    options = EngineOptions(dtype=dtype, device="cpu", block_tokens=BLOCK_TOKENS)
    draft_model = None if draft is None else DraftModel(Engine(open_model(draft), options, BLOCKS))
    return Engine(open_model(folder), options, BLOCKS, draft_model=draft_model)


def answers(
    engine: Executor, sequences: list[Sequence], *, num_blocks: int = BLOCKS, eos: tuple[int, ...] = ()
) -> tuple[dict[str, list[Drawn]], Scheduler]:
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            max_step_tokens=48,
            max_sequences=6,
            max_context_tokens=300,
            eos_token_ids=eos,
            draft_model=True,
        )
    )
    found: dict[str, list[Drawn]] = {}
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    while (plan := scheduler.plan(0.0)) is not None:
        for event in scheduler.commit(plan, engine.execute(plan), 0.0):
            if isinstance(event, Tokens):
                assert event.first_index == len(found.setdefault(event.sequence_id, []))
                found[event.sequence_id] += event.drawn
        scheduler.check()
    assert set(scheduler.counts().values()) == {0}
    return found, scheduler


def requests(speculation: Speculation | None, repeats: bool = True) -> list[Sequence]:
    """Eight of every sort, greedy and sampled; prompts with something to look up in them."""
    generator, made = random.Random(5), []
    for number in range(8):
        stem = [generator.randrange(3, 431) for _ in range(9)]
        prompt = tuple(stem * 3 if repeats else stem)
        params = SamplingParams(
            max_tokens=40,
            temperature=[0.0, 1.0, 0.7, 0.0][number % 4],
            top_p=[1.0, 0.9][number % 2],
            top_k=[0, 0, 0, 12][number % 4],
            seed=number,
            repetition_penalty=[1.0, 1.0, 1.2][number % 3],
            frequency_penalty=[0.0, 0.3][number // 4],
            logprobs=[None, 2, 0][number % 3],
            stop_token_ids=(7, 8, 9, 10, 11, 12),
            speculation=speculation,
        )
        made.append(Sequence(f"s{number}", prompt, [], params))
    return made


KINDS = [Speculation("prompt_lookup", 5, 1), Speculation("prompt_lookup", 3, 2), Speculation("draft_model", 4)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("speculation", KINDS, ids=["lookup-1", "lookup-2", "draft"])
def test_answers_are_those_without_speculation(
    folders: tuple[Path, Path], speculation: Speculation, dtype: str
) -> None:
    engine = make_engine(folders[0], folders[1], dtype)
    plain, _ = answers(engine, requests(None))
    assert len({len(answer) for answer in plain.values()}) > 1, "some answers end early"
    found, scheduler = answers(engine, requests(speculation))
    assert found == plain
    assert scheduler.totals()["proposed_tokens"] > 0
    assert scheduler.totals()["accepted_tokens"] < scheduler.totals()["proposed_tokens"]


@pytest.mark.parametrize("speculation", KINDS, ids=["lookup-1", "lookup-2", "draft"])
def test_answers_survive_preemption(folders: tuple[Path, Path], speculation: Speculation) -> None:
    engine = make_engine(folders[0], folders[0])
    plain, _ = answers(engine, requests(None))
    found, scheduler = answers(engine, requests(speculation), num_blocks=22)
    assert found == plain
    assert scheduler.totals()["preemptions"] > 0


def test_a_draft_model_that_is_the_model_is_always_right(folders: tuple[Path, Path]) -> None:
    engine = make_engine(folders[0], folders[0])
    found, scheduler = answers(engine, requests(Speculation("draft_model", 4), repeats=False))
    totals = scheduler.totals()
    assert totals["accepted_tokens"] > 0.5 * sum(map(len, found.values()))
    ends = sum(answer[-1].token_id in range(7, 13) for answer in found.values())
    assert totals["proposed_tokens"] - totals["accepted_tokens"] <= 4 * ends  # guesses behind the end of an answer


@pytest.mark.parametrize("repeated", [1, 2, 3])
def test_an_end_among_right_guesses_ends_the_answer(folders: tuple[Path, Path], repeated: int) -> None:
    """With the model as its own draft an end is guessed, too; what was drawn behind it is not told."""
    engine = make_engine(folders[0], folders[0])
    params = SamplingParams(max_tokens=50, seed=repeated, speculation=Speculation("draft_model", 6))
    (whole,) = answers(engine, [Sequence("a", (5, 6, 7), [], params)])[0].values()
    end = whole[10 * repeated].token_id
    (cut,) = answers(engine, [Sequence("a", (5, 6, 7), [], params)], eos=(end,))[0].values()
    assert cut == whole[: [each.token_id for each in whole].index(end) + 1]


def test_ranks_verify_guesses(folders: tuple[Path, Path]) -> None:
    plain, _ = answers(make_engine(folders[0]), requests(None))
    with ranked_engine(
        folders[0], ParallelLayout(tp=2, pp=2), BLOCKS, dtype="float32", block_tokens=BLOCK_TOKENS
    ) as ranks:
        found, scheduler = answers(ranks, requests(Speculation("prompt_lookup", 4, 1)))
    assert scheduler.totals()["accepted_tokens"] > 0
    same = sum([each.token_id for each in found[name]] == [each.token_id for each in plain[name]] for name in plain)
    assert same >= len(plain) - 1  # sums over ranks round differently, and a draw may fall on an edge


def test_draws_see_the_guesses_before_them() -> None:
    params = SamplingParams(presence_penalty=1.0)
    piece = Slice("a", (4,), 9, (0, 1), Draw(params, 10, 6, tuple(range(10))), guessed_token_ids=(30, 31))
    assert [each.position for each in draws_of(piece)] == [10, 11, 12]
    assert [each.history[10:] for each in draws_of(piece)] == [(), (30,), (30, 31)]
    assert {each.prompt_tokens for each in draws_of(piece)} == {6}
    assert draws_of(Slice("a", (4,), 9, (0, 1), None)) == []


@pytest.mark.parametrize(
    ("guesses", "drawn", "expected"),
    [
        ((), [], []),
        ((), [5], [5]),
        ((), [NO_TOKEN], [NO_TOKEN]),
        ((5, 6), [4, 6, 7], [4]),
        ((5, 6), [5, 4, 7], [5, 4]),
        ((5, 6), [5, 6, 7], [5, 6, 7]),
        ((5, 6), [NO_TOKEN, 6, 7], [NO_TOKEN]),
        ((5, 6), [5, NO_TOKEN, 7], [5]),
        ((5, 6), [5, 6, NO_TOKEN], [5, 6]),
    ],
)
def test_verified(guesses: tuple[int, ...], drawn: list[int], expected: list[int]) -> None:
    found = verified(guesses, [Drawn(token_id) for token_id in drawn])
    assert [each.token_id for each in found] == expected


def test_a_draft_that_breaks_off_leaves_fewer_guesses(folders: tuple[Path, Path]) -> None:
    """Logits of the draft model that are no numbers are no guess, and no fault of the request."""
    draft = Engine(
        open_model(folders[0]), EngineOptions(dtype="float32", device="cpu", block_tokens=BLOCK_TOKENS), BLOCKS
    )
    draft.kv.tensor.fill_(float("nan"))
    asked = Proposal((5,), 3, 4)  # of three tokens that it never computed
    piece = Slice("a", (5,), 3, (0, 1), Draw(SamplingParams(temperature=0.0), 4, 3, ()), proposal=asked)
    (found,) = DraftModel(draft).guess((piece,))
    assert found.guessed_token_ids == ()
    assert found.proposal is None
    (drawn,) = make_engine(folders[0]).execute(StepPlan(0, (found,))).drawn
    assert len(drawn) == 1


def test_a_draft_model_that_does_not_fit_is_refused(folders: tuple[Path, Path]) -> None:
    spec = open_model(folders[0]).spec
    check_draft(spec, spec, 512)
    with pytest.raises(InvalidConfiguration, match="vocabulary"):
        check_draft(spec, dataclasses.replace(spec, vocab_size=430), 512)
    with pytest.raises(InvalidConfiguration, match=r"engine\.max_context_tokens to 512"):
        check_draft(spec, spec, 513)


def acceptance(logits: np.ndarray, draft_logits: np.ndarray, params: SamplingParams) -> tuple[float, float]:
    """Of one position: how often both draw the same token over many seeds; and sum_x min(p(x), q(x))."""
    rows = [torch.from_numpy(np.repeat(each[None], 400, 0).astype(np.float32)) for each in (logits, draft_logits)]
    draws = [Draw(dataclasses.replace(params, seed=seed), 10, 5, ()) for seed in range(400)]
    same = [one == other for one, other in zip(*(draw(each, draws) for each in rows), strict=True)]
    p, q = (torch.softmax(torch.from_numpy(each).double() / params.temperature, -1) for each in (logits, draft_logits))
    return float(np.mean(same)), float(torch.minimum(p, q).sum())


def test_acceptance_is_that_of_a_race_and_close_to_leviathans() -> None:
    generator = np.random.default_rng(0)
    for scale in (0.1, 0.5, 2.0):
        logits = generator.standard_normal(50) * 3
        draft_logits = logits + generator.standard_normal(50) * scale
        same, most = acceptance(logits, draft_logits, SamplingParams())
        p, q = (np.exp(each - each.max()) / np.exp(each - each.max()).sum() for each in (logits, draft_logits))
        race = sum(1.0 / np.maximum(p / p[token], q / q[token]).sum() for token in range(50))
        assert same == pytest.approx(race, abs=0.1)  # four standard errors
        assert most / (2.0 - most) <= race <= most  # 1 - d to (1 - d) / (1 + d)


def test_the_same_logits_always_agree() -> None:
    logits: Any = np.random.default_rng(1).standard_normal(50)
    assert acceptance(logits, logits, SamplingParams(temperature=0.8))[0] == 1.0
