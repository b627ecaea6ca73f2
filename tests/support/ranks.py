"""Engines over several processes, driven as one: every rank executes its group's share of each plan.

Processes are forked from a server that has the engine imported, so that a layout is up in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import copyreg
import dataclasses
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

from service.ports import free_port
from spec.layout import ParallelLayout
from spec.shard import RankShard, Replicas, shard_of

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["engine.engine", "engine.model_files", "torch.distributed"])
LIMIT_S = 120.0


def _proxy(content: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(content)


copyreg.pickle(MappingProxyType, lambda proxy: (_proxy, (dict(proxy),)))  # SamplingParams.logit_bias


class RankedEngine:
    """What tests/support/stepper.py needs of an Engine. A sequence's group is drawn from its name."""

    def __init__(self, connections: list[Any], processes: list[Any], shards: list[RankShard], described: Any) -> None:
        self.connections, self.processes, self.shards = connections, processes, shards
        self.spec, num_blocks, layout = described
        self.kv = SimpleNamespace(num_blocks=num_blocks, layout=layout)

    def execute(self, plan: Any) -> Any:
        layout = self.shards[0].layout
        groups = [sum(map(ord, piece.sequence_id)) % layout.dp for piece in plan.slices]
        for connection, shard in zip(self.connections, self.shards, strict=True):
            own = tuple(piece for piece, group in zip(plan.slices, groups, strict=True) if group == shard.group)
            connection.send(dataclasses.replace(plan, slices=own))
        answers = [self.answer(connection) for connection in self.connections]
        drawn: list[Any] = [()] * len(groups)
        prompt: list[Any] = [()] * len(groups)
        for shard, result in zip(self.shards, answers, strict=True):
            if not shard.is_last_stage or shard.index:
                continue
            places = [place for place, group in enumerate(groups) if group == shard.group]
            for place, one, rows in zip(places, result.drawn, result.prompt_logprobs, strict=True):
                drawn[place], prompt[place] = one, rows
        return dataclasses.replace(answers[0], drawn=tuple(drawn), prompt_logprobs=tuple(prompt))

    def replicate_experts(self, copies: int) -> list[tuple[float, float]]:
        """What each rank found."""
        for connection in self.connections:
            connection.send(copies)
        return [self.answer(connection) for connection in self.connections]

    def replays(self) -> list[int]:
        """Of each rank, steps that were replayed."""
        for connection in self.connections:
            connection.send("replays")
        return [self.answer(connection) for connection in self.connections]

    def answer(self, connection: Any) -> Any:
        assert connection.poll(LIMIT_S), "a rank does not answer"
        found = connection.recv()
        if isinstance(found, BaseException):
            raise found
        return found


@contextlib.contextmanager
def ranked_engine(
    folder: Path,
    layout: ParallelLayout,
    num_blocks: int = 300,
    replicas: Replicas | None = None,
    adapters: dict[str, Path] | None = None,
    replayed_rows: int = 0,
    **options: Any,
) -> Iterator[RankedEngine]:
    """`options` are those of EngineOptions. `replayed_rows`: decode steps of so many are computed as on a GPU, padded
    and in tensors that stay, by what computes again where a GPU replays a graph."""
    address = f"127.0.0.1:{free_port()}"
    connections, processes = [], []
    try:
        for rank in range(layout.num_ranks):
            here, there = _CONTEXT.Pipe()
            arguments = (there, str(folder), layout, rank, address, num_blocks, replicas, adapters or {})
            process = _CONTEXT.Process(target=_rank, args=(*arguments, replayed_rows, options), daemon=True)
            process.start()
            there.close()
            connections.append(here)
            processes.append(process)
        described = [_first(connection) for connection in connections]
        spec = described[0][0]
        shards = [shard_of(spec, layout, rank, replicas=replicas) for rank in range(layout.num_ranks)]
        yield RankedEngine(connections, processes, shards, described[0])
    finally:
        for connection in connections:
            connection.close()  # the rank ends
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()


def _first(connection: Any) -> Any:
    assert connection.poll(LIMIT_S), "a rank does not start"
    found = connection.recv()
    if isinstance(found, BaseException):
        raise found
    return found


def _rank(
    connection: Any,
    folder: str,
    layout: ParallelLayout,
    rank: int,
    address: str,
    num_blocks: int,
    replicas: Replicas | None,
    adapters: dict[str, Path],
    replayed_rows: int,
    options: dict[str, Any],
) -> None:
    import torch

    from engine.adapters import AdapterFiles
    from engine.engine import Engine, EngineOptions
    from engine.groups import join
    from engine.model_files import open_model
    from worker.grammars import grammars_of

    torch.set_num_threads(1)
    try:
        files = open_model(folder)
        shard = shard_of(files.spec, layout, rank, replicas=replicas)
        groups = join(shard, address, torch.device("cpu"), timeout_s=60.0)
        loaded = {name: AdapterFiles(path, files.spec) for name, path in adapters.items()}
        chosen = EngineOptions(device="cpu", **options)
        grammars = grammars_of(files, shard, 64)
        engine = Engine(files, chosen, num_blocks, groups=groups, replicas=replicas, adapters=loaded, grammars=grammars)
        replays = _replay(engine, num_blocks, replayed_rows) if replayed_rows else []
        connection.send((files.spec, num_blocks, engine.kv.layout))
    except BaseException as error:
        connection.send(error)
        return
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            plan = connection.recv()
            if plan == "replays":
                connection.send(len(replays))
                continue
            try:
                copies = plan if isinstance(plan, int) else None
                connection.send(engine.execute(plan) if copies is None else engine.replicate_experts(copies))
            except BaseException as error:
                connection.send(error)
    groups.close()


def _replay(engine: Any, num_blocks: int, most_rows: int) -> list[str]:
    """Gets an entry for each replayed step."""
    from engine.cuda_graphs import CapturedDecodes

    replays: list[str] = []

    def record(work: Any) -> Any:
        work()

        def again() -> None:
            replays.append("")
            work()

        return again

    engine._graph_rows = most_rows
    engine.kv = engine._kv_memory(num_blocks, None)
    engine.decoder.place_kv(engine.kv)
    engine._captured = CapturedDecodes(engine.decoder, most_rows, engine.device, lambda: record)
    engine._captured.capture()
    return replays
