"""Rank 0's side of the other ranks: starts them on this host, tells them what to do, hears what came of it.

One thread reads what all of them report. The end of a connection, which is the end of a rank, is noticed there at once,
whatever everybody else waits for: then the worker is lost as a whole. `lost` says whose end was the first, the other
ranks of this host are killed (so that no collective waits for them), and `on_lost` is called.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge, wait
from typing import TypeVar

import psutil

from legato.v1 import rank_pb2
from service import logs
from service.config import WorkerConfig, to_yaml
from service.messages import constraint_to_proto
from service.status import error_from_reason
from spec.constraint import Constraint
from spec.errors import BY_REASON, InternalError, LegatoError, WorkerLost
from worker import rank_link
from worker.rank_setup import Place

logger = logs.get(__name__)

HELLO_TIMEOUT_S = 120.0  # imports, and a model that is fetched on another host
CAUSE_S = 1.0  # how long a rank that lost the others is no proof that it was the first to fail
STOP_S = 3.0
POLL_S = 0.05
READY_POLL_S = 0.5
Report, Command = rank_pb2.RankReport, rank_pb2.RankCommand
Result = TypeVar("Result")


class Ranks:
    """Ranks 1 to num_ranks - 1 of a worker. `report_progress(fraction)` is called in the reading thread."""

    def __init__(self, config: WorkerConfig, num_ranks: int, place: Place) -> None:
        """Starts what is to run on this host, unless a launcher does."""
        self.on_lost: Callable[[LegatoError], None] = lambda error: None
        self.lost: LegatoError | None = None
        self.hellos: dict[int, rank_pb2.RankReport.Hello] = {}
        self.measured: dict[int, rank_pb2.RankReport.Measured] = {}  # since their weights are loaded
        self.kept: dict[int, rank_pb2.RankReport.Kept] = {}  # of hosts' keepers
        self.progress: dict[int, float] = dict.fromkeys(range(1, num_ranks), 0.0)
        self._links: dict[int, Connection] = {}
        self._results: dict[int, queue.SimpleQueue[rank_pb2.RankResult | None]] = {}
        self._ready: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._asked: dict[int, concurrent.futures.Future[rank_pb2.RankReport.Answered]] = {}
        self.on_written: Callable[[int, int, int], None] = lambda rank, step, end: None
        self._request_ids = itertools.count(1)
        self._sending = threading.Lock()
        self._ending = False
        self._timeout_s = config.engine.rank_timeout_s
        self._key = rank_link.auth_key(config.cluster_key.get_secret_value().encode())
        host, port = place.control or ("127.0.0.1", 0)
        self._listener = Listener((host if place.control is None else "", port), "AF_INET", backlog=64)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        if place.control is None:
            address = f"{host}:{self._listener.address[1]}"
            self._processes = {rank: _start(config, rank, num_ranks, address) for rank in range(1, num_ranks)}
        self._num_ranks = num_ranks
        self._reader = threading.Thread(target=self._read, name="ranks", daemon=True)

    def accept(self) -> None:
        """Returns when all ranks have said Hello. Raises WorkerLost when one dies before, or does not in time."""
        accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        arguments = (self._listener, self._key, accepted)
        threading.Thread(target=_accept, args=arguments, name="ranks-accept", daemon=True).start()
        until_s = time.monotonic() + HELLO_TIMEOUT_S
        while len(self._links) < self._num_ranks - 1:
            self._raise_ended()
            if time.monotonic() > until_s:
                missing = [rank for rank in self.progress if rank not in self._links]
                raise WorkerLost(f"rank {missing[0]} has not come within {HELLO_TIMEOUT_S:.0f} s")
            with contextlib.suppress(queue.Empty):
                self._welcome(accepted.get(timeout=POLL_S))
        self._listener.close()
        self._results = {rank: queue.SimpleQueue() for rank in self._links}
        self._reader.start()

    def _welcome(self, link: Connection) -> None:
        try:
            rank_link.tune(link)
            report = Report.FromString(link.recv_bytes()) if link.poll(self._timeout_s) else Report()
        except (OSError, EOFError):
            return
        hello = report.hello
        if report.HasField("hello") and hello.rank in self.progress and hello.rank not in self._links:
            self._links[hello.rank], self.hellos[hello.rank] = link, hello

    def _raise_ended(self) -> None:
        for rank, process in self._processes.items():
            if (code := process.poll()) is not None and rank not in self._links:
                raise WorkerLost(f"rank {rank} (pid {process.pid}) ended before it came: {_ending(code)}")

    # ---- commands --------------------------------------------------------------------------------------------------

    def send(self, rank: int, command: rank_pb2.RankCommand) -> None:
        self.send_bytes((rank,), command.SerializeToString())

    def send_all(self, command: rank_pb2.RankCommand) -> None:
        self.send_bytes(tuple(self._links), command.SerializeToString())

    def send_bytes(self, ranks: Sequence[int], command: bytes) -> None:
        """Raises what the worker is lost for."""
        with self._sending:
            for rank in ranks:
                try:
                    rank_link.send_bytes(self._links[rank], command)
                except WorkerLost as error:
                    raise self.cause(error) from None

    def wait_ready(self, report: Callable[[float], None] = lambda fraction: None, of: int | None = None) -> None:
        """Until each, or so many of them, has said once more that it is done: it may take long over that, but not be
        stopped. Raises what the worker is lost for."""
        stopped_s = 0.0
        for _ in range(len(self._links) if of is None else of):
            while True:
                report(min(self.progress.values()))
                with contextlib.suppress(queue.Empty):
                    if self._ready.get(timeout=READY_POLL_S) is None:
                        raise self.cause(WorkerLost("a rank of this worker has ended"))
                    break
                stopped = self._stopped()
                stopped_s = stopped_s + READY_POLL_S if stopped is not None else 0.0
                if stopped is not None and stopped_s > self._timeout_s:
                    raise stopped

    def unless_lost(self, work: Callable[[], Result]) -> Result:
        """What `work()` returns or raises, in a thread of its own: where it waits for a rank that ends meanwhile, as
        those do who join, raises at once what the worker is lost for, and leaves it to wait."""
        working: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def run() -> None:
            try:
                working.set_result(work())
            except BaseException as error:
                working.set_exception(error)

        threading.Thread(target=run, name="ranks-join", daemon=True).start()
        while self.lost is None:
            with contextlib.suppress(TimeoutError):
                return working.result(POLL_S)
        raise self.lost

    def result(self, rank: int) -> rank_pb2.RankResult:
        """The next one of that rank. Raises what the worker is lost for."""
        try:
            found = self._results[rank].get(timeout=self._timeout_s)
        except queue.Empty:
            found = None
        if found is None:
            silent = WorkerLost(f"rank {rank} has not answered for {self._timeout_s:g} s")
            raise self.cause(silent)
        return found

    def ask(self, rank: int, command: rank_pb2.RankCommand) -> concurrent.futures.Future[rank_pb2.RankReport.Answered]:
        """Copy, Digest, HasLink or CutLink, carried out beside the rank's steps. Fails with what that fails with, and
        with what the worker is lost for."""
        answer: concurrent.futures.Future[rank_pb2.RankReport.Answered] = concurrent.futures.Future()
        answer.set_running_or_notify_cancel()
        command.request_id = next(self._request_ids)
        self._asked[command.request_id] = answer
        self.send(rank, command)
        if self.lost is not None:
            self._fail_asked(self.lost)
        return answer

    def compile(self, constraint: Constraint) -> None:
        """On every rank, beside its steps; whichever draws needs it. Raises what the worker is lost for."""
        self.send_all(Command(compile=constraint_to_proto(constraint)))

    # ---- what they report ------------------------------------------------------------------------------------------

    def _read(self) -> None:
        of_link = {link: rank for rank, link in self._links.items()}
        while of_link and self.lost is None:
            for link in wait(list(of_link)):
                assert isinstance(link, Connection)
                rank = of_link[link]
                try:
                    self._heard(rank, Report.FromString(link.recv_bytes()))
                except (OSError, EOFError):
                    if self._ending:
                        del of_link[link]
                        continue
                    self._lose(WorkerLost(f"rank {rank} {self._how_it_ended(rank)}"))
                    return

    def _heard(self, rank: int, report: rank_pb2.RankReport) -> None:
        match report.WhichOneof("report"):
            case "result":
                self._results[rank].put(report.result)
            case "written":
                self.on_written(rank, report.written.step, report.written.end)
            case "progress":
                self.progress[rank] = report.progress.fraction
            case "ready":
                self.progress[rank] = 1.0
                self._ready.put(rank)
            case "measured":
                self.measured[rank] = report.measured
                self._ready.put(rank)
            case "kept":
                self.kept[rank] = report.kept
                self._ready.put(rank)
            case "answered":
                self._answered(report.answered)
            case "failed":
                self._lose(self._first_to_fail(rank, report.failed))

    def _answered(self, answered: rank_pb2.RankReport.Answered) -> None:
        asked = self._asked.pop(answered.request_id)
        if answered.reason:
            asked.set_exception(error_from_reason(answered.reason, answered.message))
        else:
            asked.set_result(answered)

    def _first_to_fail(self, rank: int, failed: rank_pb2.RankReport.Failed) -> LegatoError:
        """A rank that lost the others names no culprit: one that has died, or is stopped, is looked for."""
        if failed.reason != WorkerLost.reason:
            kind = BY_REASON.get(failed.reason, InternalError)
            message = f"rank {rank}: {failed.message}"
            return InternalError(message) if kind.__init__ is not LegatoError.__init__ else kind(message)
        return self._culprit() or WorkerLost(f"rank {rank}: {failed.message}")

    def _culprit(self) -> WorkerLost | None:
        until_s = time.monotonic() + CAUSE_S
        while True:
            for rank, process in self._processes.items():
                code = process.poll()
                if code is not None and code < 0:
                    return WorkerLost(f"rank {rank} (pid {process.pid}) ended: {_ending(code)}")
            stopped = self._stopped()
            if stopped is not None or time.monotonic() > until_s:
                return stopped
            time.sleep(POLL_S)

    def _stopped(self) -> WorkerLost | None:
        """Of this host's ranks."""
        for rank, process in self._processes.items():
            with contextlib.suppress(psutil.Error):
                if process.poll() is None and psutil.Process(process.pid).status() == psutil.STATUS_STOPPED:
                    return WorkerLost(f"rank {rank} (pid {process.pid}) is stopped")
        return None

    def _how_it_ended(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return f"(pid {self.hellos[rank].pid} on another host) is gone"
        try:
            return f"(pid {process.pid}) ended: {_ending(process.wait(CAUSE_S))}"
        except subprocess.TimeoutExpired:
            return f"(pid {process.pid}) closed its connection"

    def _lose(self, error: LegatoError) -> None:
        self.lost = error
        logger.error("the worker is lost: %s", error)
        self._kill()
        for waiting in self._results.values():
            waiting.put(None)
        for _ in self._links:
            self._ready.put(None)
        self._fail_asked(error)
        self.on_lost(error)

    def _fail_asked(self, error: LegatoError) -> None:
        for request_id in list(self._asked):
            if (asked := self._asked.pop(request_id, None)) is not None:
                asked.set_exception(error)

    def cause(self, error: LegatoError) -> LegatoError:
        """Why the worker is really lost, where `error` is what rank 0 saw of it."""
        until_s = time.monotonic() + 2 * CAUSE_S
        while self.lost is None and time.monotonic() < until_s:
            time.sleep(POLL_S)
        return self.lost or self._culprit() or error

    # ---- the end ---------------------------------------------------------------------------------------------------

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for link in self._links.values():
            rank_link.close(link)

    def close(self) -> None:
        """Returns when no rank of this host runs any more, and those of others have been told."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._listener.close()
        if self.lost is None:
            with contextlib.suppress(LegatoError, KeyError):
                self.send_all(Command(stop=Command.Stop()))
        until_s = time.monotonic() + STOP_S
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until_s - time.monotonic()))
        self._kill()
        for process in self._processes.values():
            process.wait()
        if self._reader.is_alive():
            self._reader.join()


def _start(config: WorkerConfig, rank: int, num_ranks: int, address: str) -> subprocess.Popen[bytes]:
    """Its configuration holds the cluster's key, and so goes through a pipe."""
    command = [sys.executable, "-m", "worker.rank", "--rank", str(rank)]
    process = subprocess.Popen([*command, "--local-ranks", str(num_ranks), "--control", address], stdin=subprocess.PIPE)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(to_yaml(config).encode())
        process.stdin.close()
    return process


def _accept(listener: Listener, key: bytes, accepted: queue.SimpleQueue[Connection]) -> None:
    """In a thread, until the listener is closed; a stranger who says nothing keeps nobody else out."""
    while True:
        try:
            link = listener.accept()
        except OSError:
            return
        threading.Thread(target=_admit, args=(link, key, accepted), name="ranks-admit", daemon=True).start()


def _admit(link: Connection, key: bytes, accepted: queue.SimpleQueue[Connection]) -> None:
    try:
        deliver_challenge(link, key)
        answer_challenge(link, key)
    except (AuthenticationError, EOFError, OSError):
        link.close()
        return
    accepted.put(link)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
