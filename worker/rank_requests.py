"""What rank 0 asks of another rank beside its steps: answered in threads, so that no step waits for it.

Copy       between the memory of its GPU and its part of the host's region
Digest     of what landed in its part
HasLink    of the transports of its host, which the lowest rank of each host keeps
CutLink    of the same
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

import torch

from kvtransfer.digest import THREADS, HeldDigest
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from kvtransfer.transport import Transport
from legato.v1.rank_pb2 import RankCommand, RankReport
from service import logs
from service.status import reason_to_proto
from spec.errors import InternalError, LegatoError
from worker.endpoints import Endpoints
from worker.kv_region import HostRegion, copy_blocks

logger = logs.get(__name__)

REQUEST_THREADS = 4  # a cut may wait for the writer; who waits behind it is another hand-over


@dataclasses.dataclass(frozen=True, slots=True)
class OwnKV:
    """This rank's KV memory. `landing` is its part of the host's region; on a CPU the engine computes there."""

    held: RankKV
    landing: torch.Tensor
    memory: torch.Tensor


class Keeper:
    """Of this host's region and transports; owned by the process."""

    def __init__(self, names: Sequence[str], address: str, keep: RankCommand.KeepKV) -> None:
        """Raises TransportUnavailable, InvalidConfiguration."""
        self.endpoints = Endpoints(names, address)
        self.region = HostRegion(keep.region_bytes, shared=True)
        self.endpoints.register(self.region)
        self._advertised = self.endpoints.advertised(keep.host, keep.probe_offset)

    def kept(self) -> RankReport.Kept:
        return RankReport.Kept(memory_path=self.region.path, endpoints=self._advertised)


class RankRequests:
    """Owned by the process. `tell` is thread-safe."""

    def __init__(self, tell: Callable[[RankReport], None]) -> None:
        self.own: OwnKV | None = None  # once it is placed
        self.keeper: Keeper | None = None  # on the ranks that are one
        self._tell = tell
        self._requests = concurrent.futures.ThreadPoolExecutor(REQUEST_THREADS, thread_name_prefix="request")
        self._digesting = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="digest")

    def take(self, command: RankCommand) -> None:
        """One with a request_id."""
        self._requests.submit(self._answer, command)

    def _answer(self, command: RankCommand) -> None:
        try:
            answered = self._carried_out(command)
        except LegatoError as error:
            answered = RankReport.Answered(reason=reason_to_proto(error), message=error.message)
        except Exception as error:
            logger.exception("what rank 0 asked for failed")
            defect = InternalError(repr(error))
            answered = RankReport.Answered(reason=reason_to_proto(defect), message=defect.message)
        answered.request_id = command.request_id
        self._tell(RankReport(answered=answered))

    def _carried_out(self, command: RankCommand) -> RankReport.Answered:
        match command.WhichOneof("command"):
            case "copy":
                self._copy(command.copy)
            case "digest":
                return RankReport.Answered(sums=self._digest(command.digest))
            case "has_link":
                transport = self._transports[command.has_link.transport]
                return RankReport.Answered(has_link=transport.has_link(command.has_link.link_id))
            case "cut_link":
                self._transports[command.cut_link.transport].cut(command.cut_link.link_id)
        return RankReport.Answered()

    @property
    def _transports(self) -> dict[str, Transport]:
        assert self.keeper is not None
        return self.keeper.endpoints.transports

    def _copy(self, copy: RankCommand.Copy) -> None:
        assert self.own is not None
        layers = range(copy.first_layer, copy.first_layer + copy.num_layers)
        copy_blocks(self.own.landing, self.own.memory, copy.block_ids, layers, copy.to_device)

    def _digest(self, asked: RankCommand.Digest) -> bytes:
        assert self.own is not None
        chunk = asked.block_ids, asked.first_token, asked.num_tokens
        held = HeldDigest(RankMemory(self.own.held), self.own.landing, *chunk)
        calls = held.counting(range(asked.first_layer, asked.first_layer + asked.num_layers))
        concurrent.futures.wait(counted := [self._digesting.submit(call) for call in calls])
        for each in counted:
            each.result()
        return held.sums()

    def close(self) -> None:
        """Nothing is asked any more."""
        if self.keeper is not None:
            self.keeper.endpoints.close()
