"""A side of bench.peers: asked over a pipe, heard whatever else it prints, and blamed by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.side import PROGRAMS, Side, SideFailed

PROGRAM = """
import os, sys, time
from serve import serve

class Toy:
    def load(self, model, busy_s):
        print("a library says hello")
        if model == "none":
            raise ValueError("no such model")
        self.busy_s = busy_s
        return "toy 1"

    def generate(self, prompts, num_tokens):
        os.write(1, b"so does one in C\\n")
        if prompts == [[0]]:
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(1)
        ends = time.process_time() + self.busy_s
        while time.process_time() < ends:
            pass
        count = num_tokens - (prompts[0][0] == 1)
        return [[prompt[0] + index for index in range(count)] for prompt in prompts], [0.5] * num_tokens

serve(Toy())
"""

Start = Callable[..., Side]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    program, started = tmp_path / "toy.py", []
    program.write_text(PROGRAM)

    def make(model: str = "toy", busy_s: float = 0.0) -> Side:
        environment = dict(os.environ) | {"PYTHONPATH": str(PROGRAMS)}
        load = {"model": model, "busy_s": busy_s}
        started.append(Side("toy", Path(sys.executable), str(program), environment, tmp_path / "log", load))
        return started[-1]

    yield make
    for side in started:
        side.close()


def test_answers_are_not_what_libraries_print(start: Start) -> None:
    side = start()
    assert side.version == "toy 1"
    generated = side.generate([[7], [9, 9]], 3)
    assert generated.token_ids == [[7, 8, 9], [9, 10, 11]]
    assert generated.times_s == [0.5] * 3


def test_what_cannot_be_loaded_is_named(start: Start) -> None:
    with pytest.raises(SideFailed, match="toy: ValueError: no such model"):
        start("none")


def test_one_that_dies_leaves_its_last_words(start: Start) -> None:
    with pytest.raises(SideFailed, match=r"(?s)toy ended.*out of memory"):
        start().generate([[0]], 2)


def test_an_answer_of_another_length_is_refused(start: Start) -> None:
    with pytest.raises(SideFailed, match="2 were asked for"):
        start().generate([[1]], 2)


def test_cpu_time_is_counted_and_comes_to_rest(start: Start) -> None:
    side = start(busy_s=0.2)
    before_s = side.cpu_s()
    side.generate([[5]], 1)
    side.settle()
    after_s = side.cpu_s()
    assert after_s - before_s >= 0.19
    side.settle()
    assert side.cpu_s() == after_s
