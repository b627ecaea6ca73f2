"""Speculation as a client meets it: the same answers in fewer steps, counted, through hand-over and failover."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from cluster import cluster
from tiny_llama import SHAPES, make_llama

from spec import errors

SHAPE = SHAPES[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPE)


def requests() -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of a few tokens in turn, so that there is something to look up."""
    generator, made = random.Random(3), []
    for seed in range(10):
        prompt = [generator.randrange(3, SHAPE.vocab_size) for _ in range(7)] * generator.randint(1, 8)
        options: dict[str, Any] = {"max_tokens": 32, "seed": seed, "temperature": [0.0, 0.9][seed % 2]}
        if seed % 3 == 0:
            options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.2}
        if seed % 4 == 0:
            options["logprobs"] = 2
        made.append((prompt, options))
    return made


@pytest.mark.parametrize("kind", ["prompt_lookup", "draft_model"])
async def test_the_same_answers_with_fewer_steps(model: Path, redis_url: str, kind: str) -> None:
    """The draft model is the model itself, so that nearly every guess is right."""
    engine = {"draft_model": str(model)}
    async with cluster(model, redis_url, decode_engine=engine) as running:
        ask = running.client.generate
        plain = [await ask(prompt, **options) for prompt, options in requests()]
        guessed = await asyncio.gather(
            *(ask(prompt, speculation=kind, num_draft_tokens=5, ngram=1, **options) for prompt, options in requests())
        )
        proposed = await running.total("decode", "proposed_tokens")
        accepted = await running.total("decode", "accepted_tokens")
        drawn = await running.total("decode", "generated_tokens")
        await running.assert_as_at_start()
    for one, other in zip(guessed, plain, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert one.choices[0].logprobs == other.choices[0].logprobs
        assert one.route is not None
        assert one.route.transfer is not None, "handed over"
        assert other.usage.proposed_tokens == 0
        assert one.ledger is not None
        assert sum(one.ledger.stages_s.values()) == pytest.approx(one.ledger.second_token_s, abs=1e-3)
    assert sum(one.usage.proposed_tokens for one in guessed) == proposed
    assert sum(one.usage.accepted_tokens for one in guessed) == accepted > 0
    if kind == "draft_model":
        assert accepted > 0.35 * drawn  # of half the tokens, which were drawn with guesses


async def test_without_a_draft_model_the_answer_is_the_same(model: Path, redis_url: str) -> None:
    prompt, options = requests()[1]
    async with cluster(model, redis_url) as running:
        plain = await running.client.generate(prompt, **options)
        asked = await running.client.generate(prompt, speculation="draft_model", **options)
    assert asked.token_ids == plain.token_ids
    assert asked.usage.proposed_tokens == 0


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("kind", ["prompt_lookup", "draft_model"])
async def test_ranks_verify_what_was_guessed(model: Path, redis_url: str, layout: str, kind: str) -> None:
    """Rank 0 guesses for all; sampled and greedy answers are those of one rank."""
    options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "num_draft_tokens": 4, "ngram": 1}
    asked = [
        (prompt, {**options, "temperature": 0.7 * (seed % 2), "seed": seed})
        for seed, (prompt, _) in enumerate(requests()[:6])
    ]
    engine = {"num_blocks": None, "kv_memory": "4MiB"}
    async with cluster(model, redis_url, prefill=0, engine=engine) as running:
        plain = await asyncio.gather(*(running.client.generate(prompt, **given) for prompt, given in asked))
    split = {"layout": layout, "draft_model": str(model)}
    async with cluster(model, redis_url, prefill=0, engine=engine, decode_engine=split) as running:
        found = await asyncio.gather(
            *(running.client.generate(prompt, speculation=kind, **given) for prompt, given in asked)
        )
        await running.assert_as_at_start()
    assert sum(answer.usage.accepted_tokens for answer in found) > 0
    same = sum(one.token_ids == other.token_ids for one, other in zip(found, plain, strict=True))
    assert same >= len(asked) - 1  # sums over ranks round differently, and a draw may fall on an edge


async def test_a_stop_string_among_guesses(model: Path, redis_url: str) -> None:
    prompt, options = requests()[4]
    options = {**options, "logprobs": None, "ignore_eos": True}
    async with cluster(model, redis_url, decode_engine={"draft_model": str(model)}) as running:
        whole = await running.client.generate(prompt, **options)
        stop = whole.text[len(whole.text) // 2 :][:2]
        plain = await running.client.generate(prompt, stop=stop, **options)
        found = await running.client.generate(
            prompt, stop=stop, speculation="draft_model", num_draft_tokens=8, **options
        )
        await running.assert_as_at_start()
    assert found.text == plain.text == whole.text[: whole.text.index(stop)]
    assert found.token_ids == plain.token_ids


async def test_what_is_out_of_range_is_refused_by_the_router(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url) as running:
        for options, field in (
            ({"num_draft_tokens": 33}, "num_draft_tokens"),
            ({"num_draft_tokens": 0}, "num_draft_tokens"),
            ({"ngram": 17}, "ngram"),
        ):
            with pytest.raises(Exception, match=field) as raised:
                await running.client.generate([5, 6], speculation="prompt_lookup", **options)
            assert type(raised.value).__name__ == errors.InvalidParameter.__name__


async def test_a_draft_model_of_another_vocabulary_ends_the_start(model: Path, redis_url: str, tmp_path: Path) -> None:
    import dataclasses

    other = make_llama(tmp_path / "other", dataclasses.replace(SHAPE, vocab_size=SHAPE.vocab_size + 1))
    with pytest.raises(errors.InvalidConfiguration, match="vocabulary"):
        async with cluster(model, redis_url, decode_engine={"draft_model": str(other)}):
            pass
