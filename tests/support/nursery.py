"""Routers and workers as real processes that a test may kill: forked from one that has torch imported already, so that
one which was killed is back within a second. They end with this one.

python nursery.py GATES     reads {"role": ..., "name": ..., "config": FILE, "log": FILE, "netns": FILE} from standard
                            input, a line each, and answers {"pid": ...}

What is served is what `python -m router`, `prefill_svc` and `decode_svc` serve; only gates (gates.py) are put in:

    reserve   decode    Reserve was asked for, nothing is taken
    open      prefill   blocks are reserved, no writer has begun
    step      both      a step is planned and not carried out
    post      prefill   half of a chunk has landed

and transfers go wrong where gates.inject() says so, by whatever transport they go:

    flip      one bit of what lands is another
    truncate  the second half of it does not land, and is said to have
    foreign   the blocks of another prompt land: those that the worker used first
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gates import Gate, injected

import decode_svc.decode
import kvtransfer.ucx
import kvtransfer.ucx_peer
import router.__main__
import worker.endpoints
import worker.executor
import worker.sender
import worker.serving
from decode_svc.pool import DecodePool
from kvtransfer.transport import Piece, Transfer
from prefill_svc.pool import PrefillPool
from service.config import RouterConfig, WorkerConfig, load
from service.run import run_service
from spec.errors import LegatoError

PR_SET_PDEATHSIG, CLONE_NEWNET = 1, 0x40000000


def main(gates: Path) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = _child(asked, gates)
            os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)


def _child(asked: dict[str, str], gates: Path) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    if netns := asked.get("netns"):
        with open(netns) as namespace:
            assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
        options = kvtransfer.ucx.default_options
        kvtransfer.ucx.default_options = lambda host: options(host) | {"TLS": "tcp,self"}  # memory goes past a network
    config = Path(asked["config"])
    if asked["role"] == "router":
        router_config = load(RouterConfig, config, {})
        return run_service(lambda stop: router.__main__.serve(router_config, stop))
    _put_gates_in(gates, asked["name"])
    worker_config = load(WorkerConfig, config, {})
    pool = PrefillPool if asked["role"] == "prefill" else DecodePool
    return run_service(lambda stop: worker.serving.serve(worker_config, stop, pool))


def _put_gates_in(folder: Path, name: str) -> None:
    reserve, opening, step, post = (Gate(folder, name, point) for point in ("reserve", "open", "step", "post"))
    reserve_now = decode_svc.decode.DecodeService.Reserve
    open_now = worker.sender.Sender.open
    submit_now = worker.executor.OneRank.submit
    open_transports_now = worker.endpoints.open_transports

    async def gated_reserve(service: Any, request: Any, context: Any) -> Any:
        await reserve.wait_in_event_loop()
        return await reserve_now(service, request, context)

    async def gated_open(sender: Any, *arguments: Any) -> None:
        await opening.wait_in_event_loop()
        await open_now(sender, *arguments)

    def gated_submit(executor: Any, plans: Any, watch: Any, meanwhile: Any) -> None:
        meanwhile()  # the steps before are told
        step.wait()
        submit_now(executor, plans, watch)

    def gated_transports(*arguments: Any) -> Any:
        transports, reasons = open_transports_now(*arguments)
        for transport in transports:
            going = functools.partial(_post_in_halves, transport, post, functools.partial(injected, folder, name))
            transport.connect = functools.partial(_gated_connect, transport.connect, going)
        return transports, reasons

    decode_svc.decode.DecodeService.Reserve = gated_reserve  # type: ignore[method-assign]
    worker.sender.Sender.open = gated_open  # type: ignore[method-assign]
    worker.executor.OneRank.submit = gated_submit  # type: ignore[method-assign]
    worker.endpoints.open_transports = gated_transports
    # A transfer in halves does not say which rows it carries: the sender digests them itself.
    kvtransfer.ucx_peer.UcxPeer.digests_rows = False  # type: ignore[assignment, method-assign]


def _gated_connect(connect: Any, going: Any, *arguments: Any) -> Any:
    peer = connect(*arguments)
    peer.post = functools.partial(going, peer.post)
    return peer


def _post_in_halves(
    transport: Any, gate: Gate, fault: Callable[[], str], post: Any, source: Any, pieces: Sequence[Any]
) -> Transfer:
    if isinstance(pieces, list):  # no plan: a link is measured
        return post(source, pieces)  # type: ignore[no-any-return]
    whole = Transfer()
    whole.set_running_or_notify_cancel()
    pieces = list(pieces)
    middle = len(pieces) // 2

    def move() -> None:
        try:
            if middle:
                post(source, pieces[:middle]).result()
            gate.wait()
            _post_rest(transport, fault(), post, source, pieces[middle:])
        except LegatoError as error:
            whole.set_exception(error)
        else:
            whole.set_result(None)

    threading.Thread(target=move, daemon=True).start()
    return whole


def _post_rest(transport: Any, fault: str, post: Any, source: Any, pieces: Sequence[Any]) -> None:
    if fault == "truncate":
        return
    if not fault:
        post(source, pieces).result()
        return
    for piece in pieces:
        scratch = transport.register(piece.nbytes)
        if fault == "flip":
            scratch.buffer[:] = source.buffer[piece.source_offset : piece.source_offset + piece.nbytes]
            scratch.buffer[piece.nbytes // 2] ^= 0x10
        else:
            scratch.buffer[:] = source.buffer[: piece.nbytes]
        post(scratch, [Piece(0, piece.target_offset, piece.nbytes)]).result()
        scratch.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
