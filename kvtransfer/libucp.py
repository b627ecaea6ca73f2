"""What Legato uses of libucp, as ctypes: the structures and calls of ucp/api/ucp.h, UCX 1.15 or newer.

Every structure carries a field mask: libucp reads the fields whose bits are set, so a library that is newer than this
page and has grown fields at the end of a structure reads what is written here and no further. tests/kvtransfer compares
sizes and offsets with the header by the C compiler.

The library comes from the wheel `libucx-cu13` (or -cu12), or from the system (libucp.so.0).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spec.errors import TransferFailed, TransportUnavailable

OK, IN_PROGRESS = 0, 1
ERR_BUSY, ERR_EXCEEDS_LIMIT = -15, -21
_FIRST_ERROR_POINTER = ctypes.c_size_t(-100).value  # UCS_PTR_IS_ERR: a status disguised as a request

FEATURE_RMA, FEATURE_WAKEUP, FEATURE_AM = 1 << 1, 1 << 4, 1 << 6  # RMA: remote keys
THREAD_MODE_SERIALIZED = 1
ERR_HANDLING_MODE_PEER = 1
MEM_MAP_ALLOCATE = 1 << 1
AM_SEND_FLAG_EAGER, AM_SEND_FLAG_COPY_HEADER = 1 << 1, 1 << 3
AM_FLAG_WHOLE_MESSAGE = 1 << 0
CLOSE_FLAG_FORCE = 1 << 0
OP_FIELD_DATATYPE, OP_FIELD_FLAGS = 1 << 3, 1 << 4
DATATYPE_IOV = 2

ErrorHandler = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
MessageHandler = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,  # arg
    ctypes.c_void_p,  # header
    ctypes.c_size_t,
    ctypes.c_void_p,  # data
    ctypes.c_size_t,
    ctypes.c_void_p,  # ucp_am_recv_param_t
)


class Params(ctypes.Structure):
    """ucp_params_t"""

    FEATURES, MT_WORKERS_SHARED = 1 << 0, 1 << 5
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("request_size", ctypes.c_size_t),
        ("request_init", ctypes.c_void_p),
        ("request_cleanup", ctypes.c_void_p),
        ("tag_sender_mask", ctypes.c_uint64),
        ("mt_workers_shared", ctypes.c_int),
        ("estimated_num_eps", ctypes.c_size_t),
        ("estimated_num_ppn", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
    ]


class WorkerParams(ctypes.Structure):
    """ucp_worker_params_t"""

    THREAD_MODE = 1 << 0
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("thread_mode", ctypes.c_int),
        ("cpu_mask", ctypes.c_ulong * (1024 // (8 * ctypes.sizeof(ctypes.c_ulong)))),
        ("events", ctypes.c_uint),
        ("user_data", ctypes.c_void_p),
        ("event_fd", ctypes.c_int),
    ]


class WorkerAttributes(ctypes.Structure):
    """ucp_worker_attr_t, whose tail is as large as any version of it needs"""

    ADDRESS, MAX_AM_HEADER = 1 << 1, 1 << 3
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("thread_mode", ctypes.c_int),
        ("address_flags", ctypes.c_uint32),
        ("address", ctypes.c_void_p),
        ("address_length", ctypes.c_size_t),
        ("max_am_header", ctypes.c_size_t),
        ("_tail", ctypes.c_char * 128),
    ]


class MapParams(ctypes.Structure):
    """ucp_mem_map_params_t"""

    ADDRESS, LENGTH, FLAGS = 1 << 0, 1 << 1, 1 << 2
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("flags", ctypes.c_uint),
        ("prot", ctypes.c_uint),
        ("memory_type", ctypes.c_int),
        ("exported_memh_buffer", ctypes.c_void_p),
    ]


class MemoryAttributes(ctypes.Structure):
    """ucp_mem_attr_t"""

    ADDRESS = 1 << 0
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("mem_type", ctypes.c_int),
    ]


class SocketAddress(ctypes.Structure):
    """ucs_sock_addr_t"""

    _fields_ = [("addr", ctypes.c_void_p), ("addrlen", ctypes.c_uint32)]


class EndpointParams(ctypes.Structure):
    """ucp_ep_params_t, with ucp_err_handler_t written out"""

    REMOTE_ADDRESS, ERR_HANDLING_MODE, ERR_HANDLER = 1 << 0, 1 << 1, 1 << 2
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("address", ctypes.c_void_p),
        ("err_mode", ctypes.c_int),
        ("err_handler_cb", ErrorHandler),
        ("err_handler_arg", ctypes.c_void_p),
        ("user_data", ctypes.c_void_p),
        ("flags", ctypes.c_uint),
        ("sockaddr", SocketAddress),
        ("conn_request", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("local_sockaddr", SocketAddress),
    ]


class MessageHandlerParams(ctypes.Structure):
    """ucp_am_handler_param_t"""

    ID, FLAGS, CALLBACK = 1 << 0, 1 << 1, 1 << 2
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("id", ctypes.c_uint),
        ("flags", ctypes.c_uint32),
        ("cb", MessageHandler),
        ("arg", ctypes.c_void_p),
    ]


class RequestParams(ctypes.Structure):
    """ucp_request_param_t"""

    _fields_ = [
        ("op_attr_mask", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("request", ctypes.c_void_p),
        ("cb", ctypes.c_void_p),
        ("datatype", ctypes.c_uint64),
        ("user_data", ctypes.c_void_p),
        ("reply_buffer", ctypes.c_void_p),
        ("memory_type", ctypes.c_int),
        ("recv_info", ctypes.c_void_p),
        ("memh", ctypes.c_void_p),
        ("_tail", ctypes.c_char * 64),  # what later versions append
    ]


PLAIN = RequestParams()
EAGER = RequestParams(op_attr_mask=OP_FIELD_FLAGS, flags=AM_SEND_FLAG_EAGER | AM_SEND_FLAG_COPY_HEADER)
EAGER_VECTORS = RequestParams(  # the payload is an array of ucp_dt_iov_t: address and size, 8 bytes each
    op_attr_mask=OP_FIELD_FLAGS | OP_FIELD_DATATYPE, flags=EAGER.flags, datatype=DATATYPE_IOV
)
FORCE = RequestParams(op_attr_mask=OP_FIELD_FLAGS, flags=CLOSE_FLAG_FORCE)

_handle, _out, _size, _text = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p
_status, _request = ctypes.c_int, ctypes.c_void_p
_CALLS: dict[str, tuple[Any, list[Any]]] = {
    "ucp_get_version_string": (_text, []),
    "ucp_config_read": (_status, [_text, _text, _out]),
    "ucp_config_modify": (_status, [_handle, _text, _text]),
    "ucp_config_release": (None, [_handle]),
    "ucp_init_version": (_status, [ctypes.c_uint, ctypes.c_uint, _out, _handle, _out]),
    "ucp_cleanup": (None, [_handle]),
    "ucp_context_print_info": (None, [_handle, _handle]),
    "ucp_worker_create": (_status, [_handle, _out, _out]),
    "ucp_worker_destroy": (None, [_handle]),
    "ucp_worker_query": (_status, [_handle, _out]),
    "ucp_worker_release_address": (None, [_handle, _handle]),
    "ucp_worker_progress": (ctypes.c_uint, [_handle]),
    "ucp_worker_get_efd": (_status, [_handle, _out]),
    "ucp_worker_arm": (_status, [_handle]),
    "ucp_worker_set_am_recv_handler": (_status, [_handle, _out]),
    "ucp_mem_map": (_status, [_handle, _out, _out]),
    "ucp_mem_unmap": (_status, [_handle, _handle]),
    "ucp_mem_query": (_status, [_handle, _out]),
    "ucp_rkey_pack": (_status, [_handle, _handle, _out, _out]),
    "ucp_rkey_buffer_release": (None, [_handle]),
    "ucp_ep_rkey_unpack": (_status, [_handle, _text, _out]),
    "ucp_rkey_ptr": (_status, [_handle, ctypes.c_uint64, _out]),
    "ucp_rkey_destroy": (None, [_handle]),
    "ucp_ep_create": (_status, [_handle, _out, _out]),
    "ucp_ep_print_info": (None, [_handle, _handle]),
    "ucp_ep_close_nbx": (_request, [_handle, _out]),
    "ucp_ep_flush_nbx": (_request, [_handle, _out]),
    "ucp_am_send_nbx": (_request, [_handle, ctypes.c_uint, _text, _size, _handle, _size, _out]),
    "ucp_request_check_status": (_status, [_request]),
    "ucp_request_free": (None, [_request]),
}


class LibUcp:
    """The calls of `_CALLS` as attributes. Those of `briefly` keep Python's interpreter lock: they return within
    microseconds, and would wait for milliseconds to get the lock back from a thread that computes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.briefly: Any = types.SimpleNamespace()
        library, lock_keeping = ctypes.CDLL(path), ctypes.PyDLL(path)
        for name, (result, arguments) in _CALLS.items():
            for holder, source in ((self, library), (self.briefly, lock_keeping)):
                function = getattr(source, name)
                function.restype, function.argtypes = result, arguments
                setattr(holder, name, function)
        self.version: str = self.ucp_get_version_string().decode()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(name)  # tells the type checker that calls are attributes

    def text_of(self, status: int) -> str:
        return str(self._status_string(status).decode())

    @functools.cached_property
    def _status_string(self) -> Any:
        function = ctypes.CDLL(_beside(self.path, "libucs.so.0")).ucs_status_string
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int]
        return function

    def check(self, status: int, what: str) -> None:
        """Raises TransferFailed unless the status is OK."""
        if status != OK:
            raise TransferFailed(f"{what}: {self.text_of(status)}", ucs_status=status)


def failed_status(request: int | None) -> int:
    """The error in what a *_nbx call returned, or OK when it is done (None) or a request to be waited for."""
    if request is not None and request >= _FIRST_ERROR_POINTER:
        return ctypes.c_int(request & 0xFFFFFFFF).value
    return OK


def resource_names(library: LibUcp, context: int | None) -> list[str]:
    """Each transport of a context once."""
    return list(dict.fromkeys(re.findall(r"-- (\w+)/\S+", _printed(library.ucp_context_print_info, context))))


def lane_names(library: LibUcp, endpoint: int) -> list[str]:
    """Each transport of an endpoint once."""
    return list(dict.fromkeys(re.findall(r"lane\[\d+\]:\s*\d+:(\w+)/", _printed(library.ucp_ep_print_info, endpoint))))


def _printed(print_info: Callable[..., Any], handle: int | None) -> str:
    """libucp only prints what it is made of, so it prints to memory."""
    libc = ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    libc.fclose.argtypes, libc.free.argtypes = [ctypes.c_void_p], [ctypes.c_void_p]
    text, size = ctypes.c_void_p(), ctypes.c_size_t()
    stream = libc.open_memstream(ctypes.byref(text), ctypes.byref(size))
    print_info(handle, stream)
    libc.fclose(stream)
    printed = ctypes.string_at(text, size.value).decode(errors="replace")
    libc.free(text)
    return printed


@functools.cache
def load() -> LibUcp:
    """Raises TransportUnavailable when there is no libucp on this machine, or too old a one."""
    folder = _wheel_folder()
    path = str(folder / "libucp.so.0") if folder else "libucp.so.0"
    try:
        for name in ("libucs.so.0", "libuct.so.0"):  # libucp finds them loaded
            ctypes.CDLL(_beside(path, name))
        # Diagnostics would go to standard output; every failure is reported by its status.
        ctypes.CDLL(_beside(path, "libucs.so.0")).ucs_global_opts_set_value(b"LOG_LEVEL", b"fatal")
        library = LibUcp(path)
    except (OSError, AttributeError) as error:
        raise TransportUnavailable(f"no libucp ({error}); pip install libucx-cu13 brings it on Linux") from None
    if tuple(map(int, library.version.split(".")[:2])) < (1, 15):
        raise TransportUnavailable(f"libucp {library.version} is too old; 1.15 is the oldest that serves")
    return library


def _wheel_folder() -> Path | None:
    found = importlib.util.find_spec("libucx")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "lib"
    return folder if (folder / "libucp.so.0").exists() else None


def _beside(path: str, name: str) -> str:
    return str(Path(path).with_name(name)) if "/" in path else name
