"""The load on a real cluster, in this process, with a random tiny Llama."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from cluster import cluster
from rich.console import Console
from tiny_llama import SHAPES, make_llama

from legato import AsyncClient, Retries
from legato.bench.lengths import parse_lengths
from legato.bench.report import report, to_json
from legato.bench.run import Run
from legato.bench.settings import Settings, Slo
from legato.bench.table import render

ENGINE = {"max_step_tokens": 64, "max_sequences": 16}


async def test_an_open_loop_on_a_cluster_measures_it_and_leaves_nothing(tmp_path, redis_url):
    make_llama(tmp_path / "model", SHAPES[0])
    settings = Settings(
        rate=60.0,
        requests=30,
        warmup=2,
        prompt_tokens=parse_lengths("5-90", ""),
        output_tokens=parse_lengths("2-12", ""),
        ignore_eos=True,
        slo=Slo(ttft_ms=60_000),
    )
    async with (
        cluster(tmp_path / "model", redis_url, engine=ENGINE) as running,
        AsyncClient(running.address, retries=Retries(attempts=1)) as client,
    ):
        run = Run(settings)
        await run.measure(client)
        figures = report(run)
        assert (figures.finished, figures.failed, figures.unfinished) == (30, 0, 0)
        for record in figures.records:
            assert record.output_tokens == record.asked_tokens
            assert record.ttft_s >= record.ledger.ttft_s, "the ledger begins when the client sends; we, when it was due"
            assert record.ledger.total_s == pytest.approx(record.ledger.second_token_s, abs=1e-6)
            second_at_s = record.pieces[0][0] if record.pieces[0][1] > 1 else record.pieces[1][0]
            assert second_at_s - record.sent_s >= record.ledger.second_token_s, "our times are around the client's"
        second_ms = [record.ledger.second_token_s * 1e3 for record in figures.records]
        assert sum(one.mean for one in figures.ledger_ms.values()) == pytest.approx(sum(second_ms) / 30)
        assert figures.handoffs > 0
        found = json.loads(json.dumps(to_json(figures)))
        assert found["workers"] == {"prefill": 1, "decode": 1}
        assert found["slo"]["met"] == 30
        await running.assert_as_at_start()


async def test_guesses_are_counted(tmp_path, redis_url):
    make_llama(tmp_path / "model", SHAPES[0])
    settings = Settings(
        concurrency=2,
        requests=6,
        warmup=1,
        prompt_tokens=parse_lengths("20-40", ""),
        output_tokens=parse_lengths("48", ""),
        ignore_eos=True,
        speculation="prompt_lookup",
    )
    async with (
        cluster(tmp_path / "model", redis_url, engine=ENGINE) as running,
        AsyncClient(running.address, retries=Retries(attempts=1)) as client,
    ):
        run = Run(settings)
        await run.measure(client)
        figures = report(run)
        steps = await running.total("decode", "steps")
    assert figures.finished == 6
    assert 0 < figures.accepted_tokens <= figures.proposed_tokens
    assert figures.accepted_tokens == sum(record.accepted_tokens for record in figures.records)
    assert figures.accepted_tokens < figures.output_tokens
    assert 6 * 47 - figures.accepted_tokens <= 2 * steps, "two in flight: a step draws two tokens and what was guessed"
    found = to_json(figures)["speculation"]
    assert found["acceptance"] == figures.accepted_tokens / figures.proposed_tokens
    page = io.StringIO()
    Console(file=page, width=120).print(render(figures))
    assert f"{figures.accepted_tokens:,} of {figures.proposed_tokens:,} guesses right" in page.getvalue()


async def test_a_load_that_is_stopped_leaves_nothing_in_the_cluster(tmp_path, redis_url):
    make_llama(tmp_path / "model", SHAPES[0])
    async with (
        cluster(tmp_path / "model", redis_url, engine=ENGINE) as running,
        AsyncClient(running.address, retries=Retries(attempts=1)) as client,
    ):
        run = Run(Settings(concurrency=8, duration_s=60.0, ignore_eos=True, output_tokens=parse_lengths("200", "")))
        work = asyncio.create_task(run.measure(client))
        while run.load is None or run.load.finished < 3:
            await asyncio.sleep(0.02)
            assert not work.done()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        figures = report(run)
        assert figures.finished >= 3
        assert 1 <= figures.unfinished <= 8
        await running.assert_as_at_start()
