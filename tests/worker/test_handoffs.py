"""What proves that the memory of a broken hand-over is quiet."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.host import Host
from worker.handoffs import Handoffs

KEY = "a key for tests"
TICKET = worker_pb2.Ticket(reservation_id="r", producer_id="prefill-0", producer_epoch=5)


class Writer(worker_pb2_grpc.WorkerServicer):
    """Which is quiet."""

    def __init__(self) -> None:
        self.asked = 0

    async def ConfirmQuiet(self, request: Any, context: Any) -> worker_pb2.ConfirmQuietResponse:
        self.asked += 1
        return worker_pb2.ConfirmQuietResponse()


@pytest.mark.parametrize(
    ("epoch", "moved", "asked"),
    [(4, False, 1), (5, False, 1), (6, False, 0), (6, True, 1), (None, False, 1)],
    ids=["an older start", "the writer", "a later start there", "a later start elsewhere", "nobody knows"],
)
async def test_only_a_later_start_in_its_place_proves_it_without_asking(
    epoch: int | None, moved: bool, asked: int
) -> None:
    writer = Writer()
    async with Host("127.0.0.1", 0, internal_key=KEY) as host:
        host.add(worker_pb2_grpc.add_WorkerServicer_to_server, writer, "legato.v1.Worker", internal=True)

        async def find_record(worker_id: str) -> worker_pb2.WorkerRecord | None:
            assert worker_id == "prefill-0"
            if epoch is None:
                return None
            address = "elsewhere:1" if moved else host.address
            return worker_pb2.WorkerRecord(worker_id=worker_id, epoch=epoch, address=address)

        handoffs = Handoffs(typing.cast("Any", None), lambda address: channel(address, KEY), find_record)
        assert await handoffs._is_quiet(host.address, TICKET)
        assert writer.asked == asked
