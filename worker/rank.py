"""A rank of a worker that is not rank 0: it does what rank 0 says, in order, and lives no longer than it.

    python -m worker.rank --rank 1 --local-ranks 2 --control 127.0.0.1:4321      its configuration comes on stdin

dial rank 0, Hello ──▶ Load ──▶ join the others, load the weights, Ready ──▶ Measure, Measured
──▶ on another host than rank 0's, the lowest rank there: KeepKV, Kept ──▶ PlaceKV, Ready ──▶ WarmUp, Ready
──▶ plan, result, plan ...                beside that: what rank 0 asks (rank_requests.py)
the connection ends without a Stop: rank 0 is gone, and this process with it, at once, whatever it waits for
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

from engine.engine import Engine
from engine.grammar import Grammars
from engine.groups import Groups, join
from engine.layer_hook import LayerHook
from engine.model_files import open_model
from kvtransfer.layer_groups import ends_within
from kvtransfer.plan import RankKV
from legato.v1 import rank_pb2
from service import logs
from service.config import WorkerConfig, load
from service.messages import constraint_from_proto
from service.model_source import resolve_model
from service.run import EXIT_CONFIGURATION, EXIT_DEFECT, EXIT_OK
from spec.errors import InternalError, LegatoError, SetupError, WorkerLost
from spec.shard import shard_of
from worker import rank_link
from worker.adapters import by_id, check_same, open_adapters
from worker.device_memory import blocks_to_measure, fitting, measure
from worker.grammars import grammars_of
from worker.kv_region import kv_slice, landing_of, map_file
from worker.rank_messages import plan_from_message, result_to_message
from worker.rank_requests import Keeper, OwnKV, RankRequests
from worker.rank_setup import Place, host_name, layout_of, options_for

logger = logs.get(__name__)

DIAL_TIMEOUT_S = 60.0
PR_SET_PDEATHSIG = 1
Report, Command = rank_pb2.RankReport, rank_pb2.RankCommand


class Rank:
    """Owned by the process."""

    def __init__(self, config: WorkerConfig, place: Place, dial_timeout_s: float) -> None:
        assert place.control is not None
        self._config, self._place = config, place
        self._options = options_for(config.engine, place)
        self._files = open_model(resolve_model(config.engine.model, lambda fraction: None))
        self._adapters = by_id(open_adapters(config.engine, self._files.spec))
        key = config.cluster_key.get_secret_value().encode()
        self._link = rank_link.dial(*place.control, key, dial_timeout_s)
        self._sending = threading.Lock()
        self._commands: queue.SimpleQueue[rank_pb2.RankCommand] = queue.SimpleQueue()
        self._requests = RankRequests(self._tell)
        self._groups: Groups | None = None
        self._engine: Engine | None = None
        self._grammars: Grammars | None = None

    def run(self) -> None:
        """Until Stop. Raises what ends it before."""
        hello = Report.Hello(
            rank=self._place.rank,
            pid=os.getpid(),
            host=host_name(),
        )
        self._tell(Report(hello=hello))
        threading.Thread(target=self._read, args=(self._link,), name="control", daemon=True).start()
        try:
            while not (command := self._commands.get()).HasField("stop"):
                self._carry_out(command)
            self._requests.close()
        except Exception as error:
            known = error if isinstance(error, LegatoError) else InternalError(repr(error))
            if not isinstance(error, LegatoError):
                logger.exception("a step failed")
            self._tell(Report(failed=Report.Failed(reason=known.reason, message=known.message)))
            raise

    def _carry_out(self, command: rank_pb2.RankCommand) -> None:
        """Raises what the engine does."""
        match command.WhichOneof("command"):
            case "load":
                self._load(command.load)
            case "keep_kv":
                self._keep_kv(command.keep_kv)
            case "place_kv":
                self._place_kv(command.place_kv)
            case "execute":
                self._execute(command.execute)
            case "measure":
                assert self._engine is not None
                use = measure(self._engine, self._config.engine)
                self._tell(Report(measured=Report.Measured(**dataclasses.asdict(use))))
            case "warm_up":
                assert self._engine is not None
                self._engine.warm_up()
                if self._engine.graph_failure:
                    logger.warning("no CUDA graphs: %s", self._engine.graph_failure)
                self._tell(Report(ready=Report.Ready()))
            case "replicate":
                assert self._engine is not None
                self._engine.replicate_experts(command.replicate.copies)
                self._tell(Report(ready=Report.Ready()))

    def _read(self, link: Connection) -> None:
        """In a thread of its own: whatever the other one waits for, the end of the connection ends the process."""
        try:
            while True:
                command = Command.FromString(link.recv_bytes())
                if command.HasField("compile"):
                    assert self._grammars is not None and self._groups is not None
                    if self._groups.shard.is_last_stage:
                        self._grammars.compiled(constraint_from_proto(command.compile))
                    continue
                if command.request_id:
                    self._requests.take(command)
                    continue
                self._commands.put(command)
                if command.HasField("stop"):
                    return
        except (OSError, EOFError):
            logger.error("rank 0 is gone, and rank %d ends", self._place.rank)
            sys.stderr.flush()
            os._exit(EXIT_DEFECT)

    def _tell(self, report: rank_pb2.RankReport) -> None:
        with self._sending:
            rank_link.send(self._link, report)

    def _load(self, load: rank_pb2.RankCommand.Load) -> None:
        check_same(self._adapters, load.adapters)
        costs = tuple(load.layer_costs) or None
        layout = layout_of(self._config)
        shard = shard_of(
            self._files.spec, layout, self._place.rank, layer_costs=costs, head_cost=load.head_cost if costs else None
        )
        device = self._options.torch_device()
        self._groups = join(shard, load.join_address, device, self._config.engine.rank_timeout_s)
        told = 0.0

        def progress(fraction: float) -> None:
            nonlocal told
            if fraction - told >= 0.02 or fraction == 1.0:
                told = fraction
                self._tell(Report(progress=Report.Progress(fraction=fraction)))

        self._grammars = grammars_of(self._files, shard, self._config.engine.max_sequences)
        with fitting(device, "the weights of this rank", lambda: told):
            self._engine = Engine(
                self._files,
                self._options,
                blocks_to_measure(self._config.engine, device),
                progress=progress,
                groups=self._groups,
                adapters=self._adapters,
                grammars=self._grammars,
            )
        self._tell(Report(ready=Report.Ready()))

    def _keep_kv(self, keep: rank_pb2.RankCommand.KeepKV) -> None:
        address = rank_link.own_address(self._link)
        self._requests.keeper = keeper = Keeper(self._config.handoff.transports, address, keep)
        self._tell(Report(kept=keeper.kept()))

    def _place_kv(self, place: rank_pb2.RankCommand.PlaceKV) -> None:
        assert self._engine is not None and self._groups is not None
        layout, shard = self._engine.kv.layout, self._groups.shard
        part = kv_slice(map_file(place.memory_path), place.offset_bytes, place.num_blocks * layout.block_bytes)
        self._engine.place_kv(place.num_blocks, part if self._engine.device.type == "cpu" else None)
        held = RankKV(layout, shard.layers, shard.kv_heads)
        landing = landing_of(part, layout, place.num_blocks)
        self._requests.own = OwnKV(held, landing, self._engine.kv.tensor)
        self._tell(Report(ready=Report.Ready()))

    def _execute(self, message: rank_pb2.RankPlan) -> None:
        assert self._engine is not None
        assert self._groups is not None
        plan = plan_from_message(message)
        waited_s, started_s = self._groups.waited_s, time.monotonic()
        result = self._engine.execute(plan, self._hook(message))
        busy_s = time.monotonic() - started_s - (self._groups.waited_s - waited_s)
        shard = self._groups.shard
        draws = shard.is_last_stage and shard.index == 0
        self._tell(Report(result=result_to_message(plan.step, busy_s, result if draws else None)))

    def _hook(self, message: rank_pb2.RankPlan) -> LayerHook | None:
        if not message.layer_ends:
            return None
        assert self._groups is not None
        ends = ends_within(message.layer_ends, self._groups.shard.layers)
        return LayerHook(ends, lambda end: self._tell(Report(written=Report.Written(step=message.step, end=end))))


def run_rank(config: WorkerConfig, place: Place, dial_timeout_s: float = DIAL_TIMEOUT_S) -> int:
    """Returns the exit code. It ends when rank 0 says so, and leaves the signals for rank 0 to heed. A launcher may
    start it long before rank 0 listens."""
    logs.setup(f"{config.worker_id or config.role}/{place.rank}", config.telemetry.log_level)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        Rank(config, place, dial_timeout_s).run()
    except WorkerLost as error:
        logger.error("rank %d ends: %s", place.rank, error)
        return EXIT_DEFECT
    except LegatoError as error:
        logger.error("rank %d ends: %s: %s", place.rank, error.reason, error)
        return EXIT_CONFIGURATION if isinstance(error, SetupError) else EXIT_DEFECT
    except Exception:
        logger.exception("rank %d ends on a defect", place.rank)
        return EXIT_DEFECT
    return EXIT_OK


def _die_with_parent() -> None:
    """Should everything else fail: the kernel ends this process when the one that started it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description="a rank of a Legato worker; rank 0 starts it")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--local-ranks", type=int, required=True)
    parser.add_argument("--control", required=True, metavar="HOST:PORT")
    given = parser.parse_args()
    _die_with_parent()
    host, _, port = given.control.rpartition(":")
    config = load(WorkerConfig, Path("/dev/stdin"), {})
    return run_rank(config, Place(given.rank, given.rank, given.local_ranks, (host, int(port))), dial_timeout_s=0.0)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # threads of torch.distributed may still wait for ranks that are gone
