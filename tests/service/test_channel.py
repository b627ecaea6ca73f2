"""A peer that stops answering, and one that comes back."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from legato.v1 import inference_pb2, inference_pb2_grpc
from service.channel import channel
from service.status import error_from_rpc
from spec.errors import WorkerLost

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, sys
from legato.v1 import inference_pb2, inference_pb2_grpc
from service.host import Host
from service.run import run_service

class Answers(inference_pb2_grpc.InferenceServicer):
    async def Generate(self, request, context):
        yield inference_pb2.GenerateResponse()
        await asyncio.Event().wait()

    async def ListModels(self, request, context):
        return inference_pb2.ListModelsResponse()

async def main(stop):
    async with Host("127.0.0.1", int(sys.argv[1]), drain_s=0) as host:
        host.add(inference_pb2_grpc.add_InferenceServicer_to_server, Answers(), "legato.v1.Inference")
        print(host.port, flush=True)
        await stop.wait()

sys.exit(run_service(main))
"""


class Server:
    def __init__(self) -> None:
        self.port = 0
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """On the same port as before."""
        command = [sys.executable, "-c", PROGRAM, str(self.port)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    started.start()
    yield started
    started.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_dead_peer_is_noticed_inside_a_quiet_stream(server: Server, number: signal.Signals) -> None:
    async with channel(f"127.0.0.1:{server.port}") as peer:
        stream = inference_pb2_grpc.InferenceStub(peer).Generate(inference_pb2.GenerateRequest())
        assert await stream.read() == inference_pb2.GenerateResponse()
        assert server.process is not None
        server.process.send_signal(number)
        with pytest.raises(grpc.RpcError) as caught:
            await asyncio.wait_for(stream.read(), 20)
        assert type(error_from_rpc(caught.value)) is WorkerLost


async def test_a_peer_that_comes_back_on_its_address_is_found_again(server: Server) -> None:
    async with channel(f"127.0.0.1:{server.port}") as peer:
        stub = inference_pb2_grpc.InferenceStub(peer)
        await stub.ListModels(inference_pb2.ListModelsRequest())
        server.kill()
        with pytest.raises(grpc.RpcError):
            await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
        await asyncio.to_thread(server.start)
        await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=20, wait_for_ready=True)
