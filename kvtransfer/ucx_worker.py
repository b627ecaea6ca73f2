"""One libucp context, one worker, and the thread that alone calls them.

The thread sleeps in poll() on two descriptors: libucp's (ucp_worker_get_efd, armed by ucp_worker_arm) and one by which
other threads wake it. It never spins while it waits, so that a core that others keep busy costs a scheduling delay and
not a collapse. Endpoints are in mode "peer": a dead peer is reported, and all that was in flight to it completes with
an error. That mode leaves shared memory to the caller (its transports in libucp cannot report a dead peer):
kvtransfer/ucx.py asks for a pointer to the peer's memory and copies. The rest goes as active messages, which libucp
carries over TCP or RDMA: eagerly, since a rendezvous with a peer that dies is never completed; and not as ucp_put,
since over TCP a put is emulated, and the emulation ends the owner's process ("Fatal: unexpected error", UCX 1.22,
ucp_progress_rma_cmpl) when the writer dies at the wrong moment.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.message import DecodeError

from kvtransfer import libucp
from kvtransfer.ucx_context import open_context
from kvtransfer.vectors import Vectors
from legato.v1.transfer_pb2 import TransferFrame
from spec.errors import TransferFailed, TransportUnavailable

MESSAGE_ID, DATA_ID = 7, 8
IDLE_CHECK_MS = 1000  # an event that libucp did not announce costs at most this
BUSY_CHECK_MS = 20
CLOSE_TIMEOUT_S = 1.0

_log = logging.getLogger(__name__)


class Endpoint:
    """A connection to another process's worker; all links between the two share it. `lost` says why, once it is;
    `dead` whether that is because libucp found the other end gone."""

    def __init__(self, handle: int, address: bytes) -> None:
        self.handle = handle
        self.address = address
        self.lost = ""
        self.dead = False


class UcxWorker:
    """Calls these on its thread: `on_frame(frame)`; `on_data(write, data, nbytes)` for a Write whose payload lies at
    address `data` during the call, in which libucp must not be called; `on_lost(endpoint)`; `on_turn()`, which does the
    next bit of sending and says whether more is left. Raises TransportUnavailable when libucp cannot start."""

    def __init__(
        self,
        options: Mapping[str, str],
        *,
        on_frame: Callable[[TransferFrame], None],
        on_data: Callable[[TransferFrame.Write, int, int], None],
        on_lost: Callable[[Endpoint], None],
        on_turn: Callable[[], bool],
    ) -> None:
        self.library = libucp.load()
        self._on_frame, self._on_data, self._on_lost, self._on_turn = on_frame, on_data, on_lost, on_turn
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._inbox: list[bytes] = []
        self._errors: list[tuple[int, int]] = []  # (endpoint handle, status)
        self._waiting: list[tuple[int, Callable[[int], None], object]] = []
        self._endpoints: dict[bytes, Endpoint] = {}
        self._stopping = self._ended = False
        self._ending = threading.RLock()  # reentrant: a finalizer may run anywhere
        self._mappings: set[int] = set()
        self._message_handler = libucp.MessageHandler(self._receive)  # libucp holds pointers to these three
        self._data_handler = libucp.MessageHandler(self._receive_data)
        self._error_handler = libucp.ErrorHandler(lambda _, endpoint, status: self._errors.append((endpoint, status)))
        self._context = open_context(self.library, options)
        try:
            self._worker = self._open_worker()
            descriptor = ctypes.c_int()
            self.library.check(
                self.library.ucp_worker_get_efd(self._worker, ctypes.byref(descriptor)), "event descriptor"
            )
        except TransferFailed as error:
            self.library.ucp_cleanup(self._context)
            raise TransportUnavailable(f"libucp {self.library.version} cannot start: {error}") from None
        self.address = self._query_address()
        self.max_header_bytes = self._query_max_header()  # libucp does not look, and writes beyond its buffer
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = select.poll()
        for readable in (descriptor.value, self._wake):
            self._poller.register(readable, select.POLLIN)
        self._thread = threading.Thread(target=self._run, name="ucx-progress", daemon=True)
        self._thread.start()

    # ---- from any thread

    def submit(self, command: Callable[[], None]) -> None:
        """Runs `command` on the worker's thread. Raises TransferFailed when the worker is stopped."""
        with self._ending:
            if self._ended:
                raise TransferFailed("this transport is closed")
            self._commands.append(command)
            os.eventfd_write(self._wake, 1)

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of `function`, run on the worker's thread."""
        assert threading.current_thread() is not self._thread, "a verb that waits, called from a done-callback"
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def command() -> None:
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        self.submit(command)
        return answer.result()

    def stop(self) -> None:
        """Closes every endpoint and ends the thread. The context lives on until the last mapping is gone."""
        with contextlib.suppress(TransferFailed):
            self.submit(lambda: setattr(self, "_stopping", True))
        self._thread.join()

    def unmap(self, mapping: int) -> None:
        """For finalizers: from any thread, at any time."""
        with self._ending:
            if self._ended:
                self._unmap(mapping)
            else:
                self._commands.append(lambda: self._unmap(mapping))
                os.eventfd_write(self._wake, 1)

    # ---- on the worker's thread

    def map(self, nbytes: int, address: int | None) -> tuple[int, int, bytes]:
        """(mapping, address, packed remote key) of memory at `address`, or of new memory, shared where it can be."""
        params = libucp.MapParams(field_mask=libucp.MapParams.LENGTH | libucp.MapParams.FLAGS, length=nbytes)
        if address is None:
            params.flags = libucp.MEM_MAP_ALLOCATE
        else:
            params.field_mask |= libucp.MapParams.ADDRESS
            params.address = address
        mapping, packed, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
        check, library = self.library.check, self.library
        check(library.ucp_mem_map(self._context, ctypes.byref(params), ctypes.byref(mapping)), "cannot map memory")
        assert mapping.value is not None
        self._mappings.add(mapping.value)
        where = libucp.MemoryAttributes(field_mask=libucp.MemoryAttributes.ADDRESS)
        check(library.ucp_mem_query(mapping, ctypes.byref(where)), "cannot query memory")
        check(library.ucp_rkey_pack(self._context, mapping, ctypes.byref(packed), ctypes.byref(size)), "remote key")
        key = ctypes.string_at(packed, size.value)
        library.ucp_rkey_buffer_release(packed)
        return mapping.value, where.address, key

    def endpoint(self, address: bytes) -> Endpoint:
        """The endpoint to the worker at `address`, made when there is none. Raises TransferFailed."""
        known = self._endpoints.get(address)
        if known is not None:
            return known
        mask = libucp.EndpointParams
        params = libucp.EndpointParams(
            field_mask=mask.REMOTE_ADDRESS | mask.ERR_HANDLING_MODE | mask.ERR_HANDLER,
            address=ctypes.cast(ctypes.c_char_p(address), ctypes.c_void_p),
            err_mode=libucp.ERR_HANDLING_MODE_PEER,
            err_handler_cb=self._error_handler,
        )
        handle = ctypes.c_void_p()
        status = self.library.ucp_ep_create(self._worker, ctypes.byref(params), ctypes.byref(handle))
        self.library.check(status, "cannot reach the peer")
        assert handle.value is not None
        endpoint = self._endpoints[address] = Endpoint(handle.value, address)
        return endpoint

    def send(self, endpoint: Endpoint, frame: TransferFrame) -> None:
        """Sends, unless the endpoint is lost, which its links learn anyway; what libucp cannot send loses it."""
        if endpoint.lost:
            return
        encoded = frame.SerializeToString()
        if len(encoded) > self.max_header_bytes:
            self.lose(
                endpoint, f"{len(encoded)} bytes of one message, libucp takes {self.max_header_bytes}", dead=False
            )
            return
        request = self.library.briefly.ucp_am_send_nbx(
            endpoint.handle, MESSAGE_ID, encoded, len(encoded), None, 0, ctypes.byref(libucp.EAGER)
        )
        self.wait_for(request, lambda _: None)

    def send_data(
        self, endpoint: Endpoint, write: TransferFrame.Write, payload: Vectors, done: Callable[[int], None]
    ) -> None:
        """Sends what `payload` says, from where it lies, as that of `write`. done(status): it may be changed again."""
        header = write.SerializeToString()
        if len(header) > self.max_header_bytes:
            done(libucp.ERR_EXCEEDS_LIMIT)
            return
        vectors, options = payload.ctypes.data, ctypes.byref(libucp.EAGER_VECTORS)
        request = self.library.ucp_am_send_nbx(
            endpoint.handle, DATA_ID, header, len(header), vectors, len(payload), options
        )
        self.wait_for(request, done, held=payload)

    def soon(self, command: Callable[[], None]) -> None:
        """From within a callback of libucp, which must not call libucp: runs `command` in the next turn."""
        self._commands.append(command)

    def flush(self, endpoint: Endpoint) -> int | None:
        """A request that is done when all that was sent to the endpoint has left."""
        request: int | None = self.library.ucp_ep_flush_nbx(endpoint.handle, ctypes.byref(libucp.PLAIN))
        return request

    def wait_for(self, request: int | None, done: Callable[[int], None], held: object = None) -> None:
        """Calls done(status) when the request is, and keeps `held` until then."""
        failed = libucp.failed_status(request)
        if request is None or failed:
            done(failed)
        else:
            self._waiting.append((request, done, held))

    def lose(self, endpoint: Endpoint, why: str, *, dead: bool) -> None:
        """Closes the endpoint at once; what is in flight to it completes with an error."""
        if endpoint.lost:
            return
        endpoint.lost, endpoint.dead = why, dead
        if self._endpoints.get(endpoint.address) is endpoint:
            del self._endpoints[endpoint.address]
        request = self.library.ucp_ep_close_nbx(endpoint.handle, ctypes.byref(libucp.FORCE))
        self.wait_for(request, lambda _: None)
        self._on_lost(endpoint)

    # ---- the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._close_endpoints()
        finally:
            self.library.ucp_worker_destroy(self._worker)
            with self._ending:
                self._run_commands()
                self._ended = True
                os.close(self._wake)
                self._clean_up_context()

    def _turn(self) -> None:
        self._run_commands()
        more = self._on_turn()
        more |= self._progress()
        if more or self._commands or self._stopping:
            return
        if self.library.ucp_worker_arm(self._worker) == libucp.ERR_BUSY:
            return
        self._poller.poll(BUSY_CHECK_MS if self._waiting else IDLE_CHECK_MS)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _progress(self) -> bool:
        """Whether anything happened that may let others go on."""
        happened = False
        for _ in range(64):
            if not self.library.ucp_worker_progress(self._worker):
                break
            happened = True
        errors, self._errors = self._errors, []
        for handle, status in errors:
            lost = next((e for e in self._endpoints.values() if e.handle == handle), None)
            if lost is not None:
                self.lose(lost, f"the peer is lost: {self.library.text_of(status)}", dead=True)
        inbox, self._inbox = self._inbox, []
        for encoded in inbox:
            try:
                self._on_frame(TransferFrame.FromString(encoded))
            except DecodeError:
                continue  # whoever sent that waits in vain, and says so
            except Exception:  # of one peer's message: the others' links live on
                _log.exception("a message to the transport failed")
        return self._check_waiting() or happened or bool(inbox or errors)

    def _check_waiting(self) -> bool:
        check_status, free = self.library.briefly.ucp_request_check_status, self.library.briefly.ucp_request_free
        finished: list[tuple[int, Callable[[int], None]]] = []
        unfinished: list[tuple[int, Callable[[int], None], object]] = []
        for request, done, held in self._waiting:
            status = check_status(request)
            if status == libucp.IN_PROGRESS:
                unfinished.append((request, done, held))
            else:
                free(request)
                finished.append((status, done))
        self._waiting = unfinished
        for status, done in finished:
            done(status)
        return bool(finished)

    def _run_commands(self) -> None:
        while self._commands:
            command = self._commands.popleft()
            try:
                command()
            except Exception:
                _log.exception("a command of the transport failed")

    def _receive(self, _arg: int, header: int, header_bytes: int, _data: int, _nbytes: int, _param: int) -> int:
        self._inbox.append(ctypes.string_at(header, header_bytes))
        return libucp.OK

    def _receive_data(self, _arg: int, header: int, header_bytes: int, data: int, nbytes: int, _param: int) -> int:
        with contextlib.suppress(DecodeError):  # as above
            self._on_data(TransferFrame.Write.FromString(ctypes.string_at(header, header_bytes)), data, nbytes)
        return libucp.OK

    def _close_endpoints(self) -> None:
        """Last words leave first. A peer that is dead or stuck cannot hold us: its endpoint is closed by force."""
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for endpoint in self._endpoints.values():
            self.wait_for(self.flush(endpoint), lambda _: None)
        while self._waiting and time.monotonic() < deadline_s:
            if not self._progress():
                time.sleep(0.001)
        for endpoint in list(self._endpoints.values()):
            self.lose(endpoint, "this transport is closed", dead=False)
        deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self._waiting and time.monotonic() < deadline_s:
            if not self._progress():
                time.sleep(0.001)

    def _unmap(self, mapping: int) -> None:
        self._mappings.discard(mapping)
        self.library.ucp_mem_unmap(self._context, mapping)
        if self._ended:
            self._clean_up_context()

    def _clean_up_context(self) -> None:
        if not self._mappings and self._context is not None:
            self.library.ucp_cleanup(self._context)
            self._context = None

    def lanes(self, endpoint: Endpoint) -> str:
        """The transports by which libucp sends to that endpoint: "tcp", "rc_mlx5", ..."""
        return ", ".join(libucp.lane_names(self.library, endpoint.handle))

    def resources(self) -> list[str]:
        """The transports that libucp opened here: "tcp", "sysv", "cma", ..."""
        return libucp.resource_names(self.library, self._context)

    def _open_worker(self) -> int:
        params = libucp.WorkerParams(
            field_mask=libucp.WorkerParams.THREAD_MODE, thread_mode=libucp.THREAD_MODE_SERIALIZED
        )
        worker = ctypes.c_void_p()
        status = self.library.ucp_worker_create(self._context, ctypes.byref(params), ctypes.byref(worker))
        self.library.check(status, "cannot make a worker")
        kind = libucp.MessageHandlerParams
        for message_id, callback in ((MESSAGE_ID, self._message_handler), (DATA_ID, self._data_handler)):
            handler = kind(
                field_mask=kind.ID | kind.FLAGS | kind.CALLBACK,
                id=message_id,
                flags=libucp.AM_FLAG_WHOLE_MESSAGE,
                cb=callback,
            )
            status = self.library.ucp_worker_set_am_recv_handler(worker, ctypes.byref(handler))
            self.library.check(status, "cannot receive messages")
        assert worker.value is not None
        return worker.value

    def _query_address(self) -> bytes:
        wanted = libucp.WorkerAttributes(field_mask=libucp.WorkerAttributes.ADDRESS)
        self.library.check(self.library.ucp_worker_query(self._worker, ctypes.byref(wanted)), "worker address")
        address = ctypes.string_at(wanted.address, wanted.address_length)
        self.library.ucp_worker_release_address(self._worker, wanted.address)
        return address

    def _query_max_header(self) -> int:
        wanted = libucp.WorkerAttributes(field_mask=libucp.WorkerAttributes.MAX_AM_HEADER)
        self.library.check(self.library.ucp_worker_query(self._worker, ctypes.byref(wanted)), "largest header")
        return int(wanted.max_am_header)
