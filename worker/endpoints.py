"""Where peers write into the KV memory of one host: its keeper's transports, each with the one region registered."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from kvtransfer.choose import open_transports
from kvtransfer.transport import Region, Transport
from legato.v1 import worker_pb2
from service import logs
from service.config import WorkerConfig
from spec.errors import InvalidConfiguration, TransportUnavailable
from worker.kv_region import HostRegion

logger = logs.get(__name__)


class Endpoints:
    """By the transport's name, in the order of the configuration. Whoever made it closes the transports."""

    def __init__(self, names: Sequence[str], address: str) -> None:
        """Opens every transport of `names` that there is here, at this host's `address`, a number. Raises
        TransportUnavailable where none is, InvalidConfiguration."""
        opened, reasons = open_transports(names, address)
        self.transports: dict[str, Transport] = {transport.name: transport for transport in opened}
        self.regions: dict[str, Region] = {}
        for name, reason in reasons.items():
            logger.warning("transport %s is not available: %s", name, reason)
        if not opened:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise TransportUnavailable(f"no transport could be opened: {why}")

    def register(self, region: HostRegion) -> None:
        """Of one rank the first transport that opens allocates the memory; the others take it as it is."""
        for name, transport in self.transports.items():
            self.regions[name] = registered = transport.register(region.nbytes, region.whole)
            region.whole = registered.buffer

    def advertised(self, host: int, probe_offset: int) -> list[worker_pb2.TransportEndpoint]:
        return [
            worker_pb2.TransportEndpoint(
                name=name,
                address=transport.address,
                region=self.regions[name].descriptor,
                probe_offset=probe_offset,
                host=host,
            )
            for name, transport in self.transports.items()
        ]

    def close(self) -> None:
        for transport in self.transports.values():
            transport.close()


def host_of(address: str) -> str:
    """Of "host", "host:port", "::1" or "[::1]:port"."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def transport_address(config: WorkerConfig) -> str:
    """Of rank 0's host, that peers write to: what is advertised, as a number. Raises InvalidConfiguration."""
    name = host_of(config.advertise or config.host)
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise InvalidConfiguration(f"advertise names {name!r}, which has no address: {error.strerror}") from None
