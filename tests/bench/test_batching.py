"""The ways through the same requests: who is in the batch when, and that all of them end with the same tokens."""

from __future__ import annotations

import math
import random
from pathlib import Path

from tiny_llama import Shape, make_llama

from bench.batching import Request, continuous, drawn_length, full_decodes, run, static, static_shrinking
from bench.timed_loop import TimedLoop
from engine.engine import EngineOptions
from engine.model_files import open_model

LENGTHS = [3, 11, 2, 7, 5, 1, 9]


def _loop(tmp_path: Path, max_sequences: int) -> TimedLoop:
    files = open_model(make_llama(tmp_path / "model", Shape("tiny")))
    options = EngineOptions(dtype="float32", device="cpu", threads=1)
    return TimedLoop(files, options, max_sequences=max_sequences, max_tokens=24, max_step_tokens=40)


def _requests() -> list[Request]:
    draw = random.Random(3)
    return [Request([draw.randrange(3, 431) for _ in range(6)], length) for length in LENGTHS]


def test_groups() -> None:
    requests = _requests()
    assert [[one.num_tokens for one in group] for group in continuous(requests, 3)] == [LENGTHS]
    assert [[one.num_tokens for one in group] for group in static(requests, 3)] == [[11, 11, 11], [7, 7, 7], [9]]
    assert [[one.num_tokens for one in group] for group in static_shrinking(requests, 3)] == [
        [3, 11, 2],
        [7, 5, 1],
        [9],
    ]


def test_rows_and_steps(tmp_path: Path) -> None:
    """A prompt of 6 fits into the step that draws its first token, so a request of n tokens takes part in n steps."""
    loop, requests = _loop(tmp_path, 3), _requests()
    whole = run(loop, static(requests, 3))
    assert whole.num_steps == 11 + 7 + 9
    assert whole.mean_rows == (3 * 11 + 3 * 7 + 9) / 27
    shrinking = run(loop, static_shrinking(requests, 3))
    assert shrinking.num_steps == 27
    assert shrinking.mean_rows == sum(LENGTHS) / 27
    moving = run(loop, continuous(requests, 3))
    assert moving.num_steps * moving.mean_rows == sum(LENGTHS)
    assert moving.num_steps < 27
    assert 0.0 < moving.scheduler_share < 1.0


def test_full_decodes_are_of_every_request_and_of_nothing_else(tmp_path: Path) -> None:
    loop = _loop(tmp_path, 4)
    requests = [Request(request.prompt, 8) for request in _requests()[:4]]
    steps = full_decodes(loop, requests)
    assert len(steps) == 7
    assert all(step.num_sequences == step.num_tokens == 4 for step in steps)


def test_lengths_are_log_uniform() -> None:
    draw = random.Random(0)
    lengths = [drawn_length(draw, 16, 512) for _ in range(20_000)]
    assert (min(lengths), max(lengths)) == (16, 512)
    share = sum(length < 91 for length in lengths) / len(lengths)
    assert abs(share - math.log(91 / 16) / math.log(513 / 16)) < 0.015
