"""Where libucp starts: its context, and the settings it is given."""

from __future__ import annotations

import ctypes
import ipaddress
from collections.abc import Mapping
from pathlib import Path

from kvtransfer import libucp
from spec.errors import TransferFailed, TransportUnavailable


def default_options(host: str) -> dict[str, str]:
    """What libucp is told: loopback stays on loopback; without GPU and RDMA device the transports of a plain host."""
    options = {"TCP_TX_SEG_SIZE": "512k", "TCP_RX_SEG_SIZE": "512k", "TCP_MAX_POLL": "64"}
    options["TCP_MAX_IOV"] = "16"  # pieces of one system call: the most that libucp takes
    # New memory is zeros and untouched until used: never the heap, nor POSIX shared memory, which libucp fills at once.
    options["ALLOC_PRIO"] = "md:sysv,mmap"
    if _is_loopback(host):
        options["NET_DEVICES"] = "lo"
    if not Path("/proc/driver/nvidia").exists() and not Path("/sys/class/infiniband").exists():
        options["TLS"] = "tcp,sm,self"
    return options


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_context(library: libucp.LibUcp, options: Mapping[str, str]) -> int | None:
    """Its handle. Raises TransportUnavailable."""
    configuration = ctypes.c_void_p()
    try:
        library.check(library.ucp_config_read(None, None, ctypes.byref(configuration)), "configuration")
        try:
            for name, value in options.items():
                status = library.ucp_config_modify(configuration, name.encode(), value.encode())
                library.check(status, f"option {name}={value}")
            params = libucp.Params(
                field_mask=libucp.Params.FEATURES | libucp.Params.MT_WORKERS_SHARED,
                features=libucp.FEATURE_RMA | libucp.FEATURE_AM | libucp.FEATURE_WAKEUP,
                mt_workers_shared=1,  # finalizers unmap memory from their own threads
            )
            context = ctypes.c_void_p()
            status = library.ucp_init_version(1, 15, ctypes.byref(params), configuration, ctypes.byref(context))
            library.check(status, "context")
        finally:
            library.ucp_config_release(configuration)
    except TransferFailed as error:
        raise TransportUnavailable(f"libucp {library.version} cannot start: {error}") from None
    return context.value
