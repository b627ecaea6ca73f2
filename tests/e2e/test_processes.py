"""Promises P2 and P4 with real processes: `kill -9` in the middle of streams, and every client has its whole answer."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import Shape, make_llama

import legato

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

# Slow enough that a stream is still going on when a process is killed.
SHAPE = Shape("slow", hidden_size=256, intermediate_size=1024, num_hidden_layers=10, head_dim=64)
PROMPTS = [[3 + index, *range(10, 60)] for index in range(6)]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 0.9, "seed": 2, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "seed": 3, "logit_bias": {7: 2.0, 9: -3.0}, "logprobs": 2},
    {"temperature": 1.0, "seed": 4, "stop": ["zzzz"], "repetition_penalty": 1.2},
    {"temperature": 0.7, "seed": 5, "n": 2},
]
TOKENS = 160


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("up")
    model = make_llama(folder / "model", SHAPE)
    command = [
        sys.executable,
        "-m",
        "legato.command.main",
        "up",
        "--model",
        str(model),
        "--prefill",
        "2",
        "--decode",
        "2",
    ]
    with (folder / "stderr").open("w") as stderr:
        up = subprocess.Popen(
            [*command, "--prefill", "2", "--decode", "2", "--port", "0", "--run-folder", str(folder / "run")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"LEGATO_ENGINE__KV_MEMORY": "64MiB", "LEGATO_ENGINE__THREADS": "1"},
        )
    assert up.stdout is not None
    line = up.stdout.readline()
    assert line.startswith("ready grpc="), (folder / "stderr").read_text()
    yield line.removeprefix("ready grpc=").strip()
    up.terminate()
    assert up.wait(15) == 0


@pytest.fixture(scope="module")
def undisturbed(address: str) -> list[Any]:
    with legato.Client(address, timeout_s=120) as client:
        return [_facts(client.generate(p, **_options(o))) for p, o in zip(PROMPTS, OPTIONS, strict=True)]


@pytest.mark.parametrize("victims", [("decode-0",), ("prefill-0",), ("router-0",), ("decode-1", "prefill-1")])
def test_whoever_is_killed_in_mid_stream(address: str, undisturbed: list[Any], victims: tuple[str, ...]) -> None:
    with legato.Client(address, timeout_s=120, retries=legato.Retries(attempts=40)) as client:
        pids = _pids(client)
        with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
            streams = [client.stream(p, **_options(o)) for p, o in zip(PROMPTS, OPTIONS, strict=True)]
            answers = [pool.submit(_read, stream) for stream in streams]
            while sum(len(choice.token_ids) for stream in streams for choice in stream.answer.choices) < 120:
                time.sleep(0.005)
            for victim in victims:
                os.kill(pids[victim], signal.SIGKILL)
            found = [answer.result() for answer in answers]
        assert [_facts(answer) for answer in found] == undisturbed
        again = [answer.route.attempts + answer.route.sends for answer in found if answer.route is not None]
        if victims != ("prefill-0",):  # a prefill worker may have had nothing left to do
            assert max(again) > 2, "nobody was in mid-stream: the test is about those who were"
        _wait_for_all(client)


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {"max_tokens": TOKENS, "ignore_eos": True, **options}


def _read(stream: Any) -> Any:
    for _ in stream:
        pass
    return stream.answer


def _facts(answer: Any) -> Any:
    return [(choice.token_ids, choice.text, choice.finish_reason, choice.logprobs) for choice in answer.choices]


def _pids(client: legato.Client) -> dict[str, int]:
    """Workers as the router sees them; the router is the other child of `up` that runs one."""
    pids = {worker.worker_id: worker.pid for worker in client.cluster().workers}
    parent = Path(f"/proc/{pids['decode-0']}/stat").read_text().rsplit(")", 1)[1].split()[1]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except OSError:
            continue
        if stat.rsplit(")", 1)[1].split()[1] == parent and "\0router\0" in command:
            pids["router-0"] = int(folder.name)
    return pids


def _wait_for_all(client: legato.Client) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        if sum(worker.state == "ready" for worker in client.cluster().workers) == 4:
            return
        time.sleep(0.1)
    raise AssertionError("what died did not come back")
