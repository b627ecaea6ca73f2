"""A rank that dies, or is stopped, takes its worker down, quickly, typed and whole: no process of it stays.

The worker is a process as an operator starts it, of three ranks or two; the router is in this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from cluster import KEY, Cluster, cluster, two_free_ports
from tiny_llama import Shape, make_llama

from legato.errors import LegatoError
from service.config import EngineConfig, WorkerConfig, save
from spec.errors import OutOfBlocks, WorkerLost
from spec.layout import ParallelLayout
from worker.ranks import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory as Linux alone does it")

# Slow enough that a stream is still going on when a process is killed.
SHAPE = Shape("slow", hidden_size=256, intermediate_size=1024, num_hidden_layers=10, head_dim=64)
SOON_S = 25.0  # far below the timeout of a collective, and far above what it takes
PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPE)


class Worker:
    """`ranks` are the processes of ranks 1, 2, ..."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        redis_url: str,
        layout: str,
        rank_timeout_s: float,
        launch: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        engine = EngineConfig(
            model=str(model), device="cpu", threads=1, kv_memory=2**26, layout=layout, rank_timeout_s=rank_timeout_s
        )
        config = WorkerConfig(
            role="decode", worker_id="decode-0", redis_url=redis_url, cluster="test", cluster_key=KEY, engine=engine
        )
        save(config, folder / "config.yaml")
        self.log = folder / "log"
        with self.log.open("w") as log:
            command = [sys.executable, "-m", "decode_svc", "--config", str(folder / "config.yaml")]
            environment = os.environ | launch
            self.process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        self.ranks: list[psutil.Process] = []

    async def until(self, words: str, num_others: int) -> None:
        """It has said so, and has started so many ranks."""
        until_s = time.monotonic() + 120
        while words not in self.log.read_text() or len(self.ranks) < num_others:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until_s, self.log.read_text()
            await asyncio.sleep(0.01)
            by_rank = {_rank_of(each): each for each in psutil.Process(self.process.pid).children()}
            self.ranks = [by_rank[rank] for rank in sorted(by_rank) if rank > 0]

    async def ended(self) -> int:
        """The exit code of rank 0, once nobody of it runs any more."""
        until_s = time.monotonic() + SOON_S
        while self.process.poll() is None or any(rank.is_running() and _alive(rank) for rank in self.ranks):
            assert time.monotonic() < until_s, self.log.read_text()
            await asyncio.sleep(0.02)
        code = self.process.returncode
        assert code is not None
        return code

    def kill_all(self) -> None:
        for each in (self.process, *self.ranks):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                each.kill()
        self.process.wait()


def _rank_of(process: psutil.Process) -> int:
    """0: it is none, or not yet."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return int(words[words.index("--rank") + 1]) if "--rank" in words else 0
    return 0


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.asynccontextmanager
async def streaming(model: Path, redis_url: str, *, begun_first: bool = True) -> AsyncIterator[None]:
    """Its block runs while tokens are being drawn; not `begun_first`: as soon as they are asked for."""
    begun = asyncio.Event()

    async def read(running: Cluster) -> None:
        with contextlib.suppress(LegatoError):
            async for _ in running.client.stream(PROMPT, max_tokens=900, ignore_eos=True):
                begun.set()

    async with cluster(model, redis_url, prefill=0, decode=0) as running:
        reading = asyncio.create_task(read(running))
        if begun_first:
            await asyncio.wait_for(begun.wait(), 30)
            await asyncio.sleep(0.1)
        yield
        reading.cancel()
        await asyncio.wait([reading])


def launched(folder: Path, launch: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """One more rank of the worker in `folder`."""
    command = [sys.executable, "-m", "decode_svc", "--config", str(folder / "config.yaml")]
    return subprocess.Popen(command, env=os.environ | launch, stdin=subprocess.DEVNULL)


READY = "state=ready"
MOMENTS = {"starting": "starting ranks", "loading": "loading weights", "idle": READY, "in a step": READY}


@pytest.mark.parametrize(
    ("layout", "victim", "moment"),
    [
        *((*each, moment) for each in (("tp2", 1), ("pp3", 2), ("pp3", 0)) for moment in MOMENTS),
        ("dp2-stage", 1, "in a step"),
    ],
)
async def test_whoever_is_killed_and_whenever(
    tmp_path: Path, model: Path, redis_url: str, moment: str, layout: str, victim: int
) -> None:
    worker = Worker(tmp_path, model, redis_url, layout, rank_timeout_s=30.0)
    try:
        await worker.until(MOMENTS[moment], ParallelLayout.parse(layout).num_ranks - 1)
        pid = worker.process.pid if victim == 0 else worker.ranks[victim - 1].pid
        async with streaming(model, redis_url) if moment == "in a step" else contextlib.nullcontext():
            os.kill(pid, signal.SIGKILL)
            code = await worker.ended()
        log = worker.log.read_text()
        if victim == 0:
            assert code == -signal.SIGKILL
        else:
            assert code == 1, log
            assert "legato: WORKER_LOST: rank" in log
            assert f"rank {victim} (pid {pid}) ended" in log
            assert "SIGKILL" in log
            assert "Traceback" not in log
    finally:
        worker.kill_all()


async def test_whoever_is_killed_while_the_others_wait_for_it_to_join(
    tmp_path: Path, model: Path, redis_url: str
) -> None:
    worker = Worker(tmp_path, model, redis_url, "tp2", rank_timeout_s=120.0)
    try:
        await worker.until("joining ranks", 1)
        worker.ranks[0].suspend()
        await asyncio.sleep(1.0)
        worker.ranks[0].kill()
        assert await worker.ended() == 1, worker.log.read_text()
        assert f"rank 1 (pid {worker.ranks[0].pid}) ended" in worker.log.read_text()
    finally:
        worker.kill_all()


def test_a_loss_ends_the_wait_for_what_goes_on_waiting() -> None:
    ranks, may_end, lost = object.__new__(Ranks), threading.Event(), WorkerLost("rank 1 is gone")
    ranks.lost = None
    assert ranks.unless_lost(lambda: 7) == 7
    with pytest.raises(OutOfBlocks):
        ranks.unless_lost(lambda: raise_(OutOfBlocks("none is left")))
    threading.Timer(0.2, lambda: setattr(ranks, "lost", lost)).start()
    with pytest.raises(WorkerLost) as raised:
        ranks.unless_lost(lambda: may_end.wait(60.0))
    assert raised.value is lost
    may_end.set()


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("layout", "moment"),
    [("pp3", "in a step"), ("tp2", "in a step"), ("dp2-stage", "in a step"), ("tp2", "idle"), ("tp2", "loading")],
)
async def test_a_rank_that_is_stopped(tmp_path: Path, model: Path, redis_url: str, layout: str, moment: str) -> None:
    """Whichever group of ranks waits for it. What is idle learns of it with the next step."""
    last = ParallelLayout.parse(layout).num_ranks - 1
    worker = Worker(tmp_path, model, redis_url, layout, rank_timeout_s=3.0)
    try:
        await worker.until(MOMENTS[moment], last)
        pid = worker.ranks[last - 1].pid
        if is_before := moment != "in a step":
            os.kill(pid, signal.SIGSTOP)
        stream = streaming(model, redis_url, begun_first=not is_before)
        async with contextlib.nullcontext() if moment == "loading" else stream:
            if not is_before:
                os.kill(pid, signal.SIGSTOP)
            code = await worker.ended()
        log = worker.log.read_text()
        assert code == 1, log
        assert f"rank {last} (pid {pid}) is stopped" in log
    finally:
        worker.kill_all()


async def test_asked_to_stop_it_stops_whole(tmp_path: Path, model: Path, redis_url: str) -> None:
    worker = Worker(tmp_path, model, redis_url, "pp2-tp2", rank_timeout_s=30.0)
    try:
        await worker.until(READY, 3)
        worker.process.terminate()
        assert await worker.ended() == 0, worker.log.read_text()
    finally:
        worker.kill_all()


async def test_a_launcher_starts_the_ranks(tmp_path: Path, model: Path, redis_url: str) -> None:
    """As torchrun does; when the worker is asked to stop, the other rank ends with it, in peace."""
    port = two_free_ports()
    launch = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    worker = Worker(tmp_path, model, redis_url, "tp2", 30.0, launch | {"RANK": "0", "LOCAL_RANK": "0"})
    other = launched(tmp_path, launch | {"RANK": "1", "LOCAL_RANK": "1"})
    try:
        await worker.until(READY, 0)
        async with streaming(model, redis_url):
            pass
        worker.process.terminate()
        assert await worker.ended() == 0, worker.log.read_text()
        assert other.wait(10) == 0
    finally:
        worker.kill_all()
        other.kill()
        other.wait()


async def test_what_a_rank_cannot_load_is_the_workers_error(tmp_path: Path, model: Path, redis_url: str) -> None:
    worker = Worker(tmp_path, model, redis_url, "tp3", rank_timeout_s=30.0)
    try:
        assert await worker.ended() == 78
        assert "tp 3" in worker.log.read_text()
    finally:
        worker.kill_all()
