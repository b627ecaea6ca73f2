"""`legato up` with real processes and a tiny model: ready line, restart after kill -9, clean stop, no orphan."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_llama import SHAPES, make_llama

import legato
from legato.command import up
from legato.command.main import run
from service.config import ClusterConfig

READY_S, STOP_S = 120.0, 15.0  # deadlines, with room for a busy machine: `up` itself kills what is left after 9 s


@dataclasses.dataclass
class Up:
    process: subprocess.Popen[str]
    address: str
    stderr: Path

    def pids(self) -> dict[str, int]:
        """Of the workers and the router, as the log of state changes has them last."""
        found = {}
        for words in map(str.split, self.stderr.read_text().splitlines()):
            if "pid" in words:
                found[words[2]] = int(words[words.index("pid") + 1])
        return found

    def told(self, name: str) -> list[list[str]]:
        """What it said of one process, in words: seconds, "s", name, state, ..."""
        lines = map(str.split, self.stderr.read_text().splitlines())
        return [words for words in lines if len(words) > 3 and words[2] == name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), SHAPES[0])


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[subprocess.Popen[str]] = []

    def begin(*before: str, **variables: str) -> Up:
        stderr = tmp_path / "stderr"
        command = [*before, sys.executable, "-m", "legato.command.main", "up", "--model", str(model), "--port", "0"]
        with stderr.open("w") as file:
            process = subprocess.Popen(
                [*command, "--run-folder", str(tmp_path / "run")],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | {"LEGATO_ENGINE__KV_MEMORY": "1MiB", "LEGATO_ENGINE__THREADS": "1"} | variables,
            )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready grpc="), stderr.read_text()
        return Up(process, line.removeprefix("ready grpc=").strip(), stderr)

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_up_serves_restarts_what_dies_and_stops_clean(start: Callable[..., Up]) -> None:
    cluster = start()
    with legato.Client(cluster.address, timeout_s=READY_S, retries=legato.Retries(attempts=100)) as client:
        whole = client.generate("abc", max_tokens=12, temperature=0.0, ignore_eos=True)
        assert whole.route is not None
        assert (whole.route.prefill_worker_id, whole.route.decode_worker_id) == ("prefill-0", "decode-0")
        assert whole.ledger is not None
        assert abs(whole.ledger.total_s - (whole.ledger.second_token_s or 0)) < 1e-3
        assert whole.ledger.clock_shift_s < 1e-3
        for victim in ("decode-0", "router-0"):
            before = cluster.pids()
            os.kill(before[victim], signal.SIGKILL)
            again = client.generate("abc", max_tokens=12, temperature=0.0, ignore_eos=True)
            assert again.token_ids == whole.token_ids
            wait_for(lambda victim=victim, before=before: cluster.pids()[victim] != before[victim], READY_S)
    pids = cluster.pids()
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.process.wait(STOP_S) == 0, cluster.stderr.read_text()
    assert not [name for name, pid in pids.items() if is_alive(pid)]
    assert cluster.process.stdout is not None
    assert cluster.process.stdout.read() == ""
    assert_no_secret_stays(cluster)


def test_a_killed_redis_is_started_again_and_leaves_no_orphan(start: Callable[..., Up]) -> None:
    cluster = start()
    for times in (1, 2):  # the tether that `up` shows, then the server itself
        tether = cluster.pids()["redis"]
        (server,) = children_of(tether)
        os.kill((tether, server)[times - 1], signal.SIGKILL)
        wait_for(lambda ended=(tether, server): not any(is_alive(pid) for pid in ended), 30.0)
        wait_for(lambda times=times: [words[3] for words in cluster.told("redis")].count("ready") == times + 1, READY_S)
    again = ["restarting", "starting", "ready"]
    assert [words[3] for words in cluster.told("redis")] == ["starting", "ready", *again, *again]
    (server,) = children_of(cluster.pids()["redis"])
    with legato.Client(cluster.address, timeout_s=READY_S) as client:
        wait_for(lambda: client.cluster().registry_reachable, READY_S)
        assert client.generate("abc", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait(STOP_S) == 0, cluster.stderr.read_text()
    assert not is_alive(server)
    assert_no_secret_stays(cluster)


def test_closing_the_terminal_stops_all(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "legato.command.main", "up", "--model", str(model), "--port", "0"]
    environment = os.environ | {"LEGATO_ENGINE__KV_MEMORY": "1MiB", "LEGATO_ENGINE__THREADS": "1"}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], [*command, "--run-folder", str(tmp_path / "run")], environment)
    shown = b""
    while b"ready grpc=" not in shown:
        shown += os.read(terminal, 4096)
    children = [child for one in children_of(pid) for child in (one, *children_of(one))]
    assert len(children) >= 5
    os.close(terminal)
    wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid, STOP_S)
    assert not any(is_alive(child) for child in children)
    assert {path.suffix for path in (tmp_path / "run").iterdir()} == {".log"}


def test_up_says_what_keeps_its_router_from_serving(start: Callable[..., Up], model: Path) -> None:
    cluster = start()
    tokenizer = model / "tokenizer.json"
    hidden = tokenizer.rename(model / "hidden")
    try:
        os.kill(cluster.pids()["router-0"], signal.SIGKILL)
        wait_for(lambda: "still waiting for router-0" in cluster.stderr.read_text(), READY_S)
        (line,) = [one for one in cluster.stderr.read_text().splitlines() if "still waiting" in one]
        assert "every worker is ready" in line
        assert line.endswith("has no tokenizer.json")
    finally:
        hidden.rename(tokenizer)
    wait_for(lambda: [words[3] for words in cluster.told("router-0")].count("ready") == 2, READY_S)


def test_nohup_keeps_it_up_and_a_stream_that_the_stop_ends_says_so(start: Callable[..., Up]) -> None:
    cluster = start("nohup", LEGATO_DRAIN_S="0")
    cluster.process.send_signal(signal.SIGHUP)
    code = (
        "import legato, sys\n"
        "client = legato.Client(sys.argv[1], retries=legato.Retries(attempts=3))\n"
        "stream = client.stream('abc', max_tokens=500, ignore_eos=True)\n"
        "try:\n"
        "    for piece in stream:\n"
        "        print(piece.index, flush=True)\n"
        "except legato.LegatoError as error:\n"
        "    assert error.answer == stream.answer and error.answer.token_ids\n"
        "    print(error.details['first_reason'], error, flush=True)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    user = subprocess.Popen(
        [sys.executable, "-c", code, cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "0\n"
    cluster.process.send_signal(signal.SIGTERM)
    said, log = user.communicate(timeout=READY_S)
    assert cluster.process.wait(STOP_S) == 0
    last = said.splitlines()[-1]
    assert last.startswith("DRAINING no router answers at")
    assert f"Connection refused; first it failed because the router at {cluster.address} stopped (DRAINING); " in last
    assert " of the answer had come (request req-" in last
    assert log == ""


def test_no_orphan_when_up_itself_is_killed(start: Callable[..., Up]) -> None:
    cluster = start()
    pids = cluster.pids()
    assert set(pids) == {"redis", "router-0", "prefill-0", "decode-0"}
    cluster.process.kill()
    wait_for(lambda: not any(is_alive(pid) for pid in pids.values()), 30.0)


def test_adapters_of_the_command_line_reach_both_pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ClusterConfig] = []
    monkeypatch.setattr(up, "fetch_model", lambda name: None)

    async def keep(config: ClusterConfig, folder: Path) -> int:
        asked.append(config)
        return 0

    monkeypatch.setattr(up, "_up", keep)
    assert run(["up", "--adapter", "poems=/lora/poems", "--adapter", "prose=./prose"]) == 0
    workers = asked[0].resolve("redis://127.0.0.1").workers()
    assert [worker.role for worker in workers] == ["prefill", "decode"]
    assert all(worker.engine.adapters == {"poems": "/lora/poems", "prose": "./prose"} for worker in workers)
    assert run(["up", "--adapter", "poems"]) == 4
    monkeypatch.setenv("LEGATO_DECODE_ENGINE__ADAPTERS", "poems=/other")
    assert run(["up", "--adapter", "poems=/lora/poems"]) == 4


def test_up_ends_when_a_worker_cannot_load_its_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    command = [sys.executable, "-m", "legato.command.main", "up", "--model", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False)
    assert done.returncode == 4, done.stderr
    assert "unheard-of" in done.stderr.splitlines()[-1]
    assert "restarting" not in done.stderr
    assert done.stdout == ""


def assert_no_secret_stays(cluster: Up) -> None:
    """The cluster's key and the password of the embedded server; the logs stay."""
    assert {path.suffix for path in (cluster.stderr.parent / "run").iterdir()} == {".log"}


def children_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return sys.platform != "linux"


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come"
        time.sleep(0.05)
