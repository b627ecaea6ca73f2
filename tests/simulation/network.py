"""The network between simulated processes, and gRPC as both ends of a call see it.

A channel stands in for `grpc.aio.insecure_channel`, a server for what `service.host.Host` runs its guarded handlers in;
all that is above them is the product. What is carried:

    a call      request and response bytes, each direction in order; lost only with the whole call
    a break     UNAVAILABLE for the client, cancellation for the handler; a dead process breaks its calls at once, a
                partition or a stopped process after KEEPALIVE_S; what was on its way may still reach the handler first
    refused     no process listens on the address, but the machine answers

While `mischief` is above 0, calls are also delivered twice or late, and messages of one stream are lost, repeated and
swapped, which no gRPC over TCP does: whoever stands that stands a faulty proxy.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import grpc

from service.auth import Authenticator
from service.handlers import HandlerGuard
from tests.simulation.loop import Process, SimulatedLoop

KEEPALIVE_S = 3.0  # until a peer that does not answer is given up: service/channel.py
CONNECT_S = 1.0  # until a connection attempt without an answer is
TICK_S = 1e-9  # timers of one instant fire in any order
MISCHIEF_METHODS = ("Handoff", "Subscribe")  # streams whose single messages get lost while there is mischief

Code = grpc.StatusCode


class Network:
    """Latencies, partitions and all calls. Hosts are named like the processes on them; a restart keeps its host."""

    def __init__(self, loop: SimulatedLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.mischief = 0.0
        self.latency_s = 0.0004
        self.slow_s: dict[str, float] = {}  # by host: added to what comes and goes there
        self.servers: dict[str, Server] = {}  # by address, while the process lives
        self.calls: dict[Call, None] = {}
        self.begun: list[tuple[str, bytes]] = []  # of hand-overs: where, and the first message
        self.defects: list[str] = []  # statuses that only a defect ends a call with
        self._blocked: dict[frozenset[str], float] = {}  # pairs of hosts, since when
        self._held: dict[frozenset[str], list[Callable[[], None]]] = {}

    # ---- links -----------------------------------------------------------------------------------------------------

    def delay_s(self, source: str, target: str) -> float:
        delay_s = self.rng.expovariate(1 / self.latency_s)
        if self.slow_s:
            delay_s += self.rng.random() * (self.slow_s.get(source, 0.0) + self.slow_s.get(target, 0.0))
        return delay_s

    def is_blocked(self, one: str, other: str) -> bool:
        return bool(self._blocked) and frozenset((one, other)) in self._blocked

    def hold(self, one: str, other: str, go_on: Callable[[], None]) -> None:
        """Until the partition between the two heals."""
        self._held.setdefault(frozenset((one, other)), []).append(go_on)

    def block(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        if pair not in self._blocked:
            self._blocked[pair] = self.loop.time()
            self.loop.call_later(KEEPALIVE_S, self._give_up, pair, self.loop.time())

    def heal(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        self._blocked.pop(pair, None)
        for go_on in self._held.pop(pair, []):
            go_on()
        for call in [call for call in self.calls if {call.client.name, call.server_host} == pair]:
            if not call.client.is_alive or (call.server is not None and not call.server.is_alive):
                call.cut("Connection reset by peer")

    def _give_up(self, pair: frozenset[str], since_s: float) -> None:
        if self._blocked.get(pair) == since_s:
            for call in [call for call in self.calls if {call.client.name, call.server_host} == pair]:
                call.cut("keepalive watchdog timeout")

    # ---- processes -------------------------------------------------------------------------------------------------

    def crash(self, process: Process) -> None:
        process.is_alive = False
        for address in [address for address, server in self.servers.items() if server.process is process]:
            del self.servers[address]
        for call in [call for call in self.calls if process in (call.client, call.server)]:
            if not self.is_blocked(call.client.name, call.server_host):
                call.cut("Connection reset by peer")

    def stop(self, process: Process) -> None:
        process.is_stopped = True
        stopped_at_s = process.stopped_at_s = self.loop.time()  # type: ignore[attr-defined]

        def give_up() -> None:
            if process.is_stopped and process.stopped_at_s == stopped_at_s:  # type: ignore[attr-defined]
                for call in [call for call in self.calls if process in (call.client, call.server)]:
                    call.cut("keepalive watchdog timeout")

        self.loop.call_later(KEEPALIVE_S, give_up)

    def channel(self, address: str, *_options: Any, **_more: Any) -> Channel:
        """In place of grpc.aio.insecure_channel."""
        return Channel(self, address)


class Channel:
    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._calls: list[ClientCall] = []
        self.unary_unary = self.unary_stream = self.stream_unary = self.stream_stream = self._method

    def _method(self, path: str, request_serializer: Any, response_deserializer: Any, **_options: Any) -> Any:
        def call(request: Any = None, *, timeout: float | None = None, metadata: Any = None) -> ClientCall:
            made = ClientCall(self._network, self._address, path, request_serializer, response_deserializer)
            made.begin(request, timeout, metadata or ())
            self._calls = [earlier for earlier in self._calls if not earlier.done()] + [made]
            return made

        return call

    async def close(self, grace: float | None = None) -> None:
        for call in self._calls:
            call.cancel()


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """What the network knows of one call. `first` and `last` keep each direction in order."""

    network: Network
    client: Process
    client_end: ClientCall
    address: str
    method: str
    server: Process | None = None
    server_end: ServerCall | None = None
    server_host: str = ""
    _client_is_cut: bool = False
    _server_is_cut: bool = False
    _to_client_at_s: float = 0.0
    _to_server_at_s: float = 0.0

    def to_server(self, deliver: Callable[..., None], *given: Any, is_message: bool = False) -> None:
        assert self.server is not None
        if self._server_is_cut:
            return
        for delay_s in self._delays(is_message):
            at_s = self.network.loop.time() + self.network.delay_s(self.client.name, self.server_host) + delay_s
            if not delay_s:
                at_s = self._to_server_at_s = max(at_s, self._to_server_at_s + TICK_S)
            self.network.loop.call_at(at_s, self._arrive_at_server, deliver, given, context=_NOBODY)

    def to_client(self, deliver: Callable[..., None], *given: Any, is_message: bool = False) -> None:
        if self._client_is_cut:
            return
        for delay_s in self._delays(is_message):
            at_s = self.network.loop.time() + self.network.delay_s(self.server_host, self.client.name) + delay_s
            if not delay_s:
                at_s = self._to_client_at_s = max(at_s, self._to_client_at_s + TICK_S)
            self.network.loop.call_at(at_s, self._arrive_at_client, deliver, given, context=_NOBODY)

    def _delays(self, is_message: bool) -> tuple[float, ...]:
        """Of each copy of a message, beyond the network's own; 0 keeps its place in the order."""
        network = self.network
        if not (is_message and network.mischief and self.method in MISCHIEF_METHODS):
            return (0.0,)
        mood = network.rng.random() / network.mischief
        if mood < 0.25:
            return ()
        if mood < 0.5:
            return (0.0, network.rng.uniform(0.0, 1.0))
        return (network.rng.uniform(0.0, 0.1),) if mood < 1.0 else (0.0,)

    def _arrive_at_server(self, deliver: Callable[..., None], given: Any) -> None:
        if self._server_is_cut:
            return
        if self.network.is_blocked(self.client.name, self.server_host):
            self._hold(self._arrive_at_server, deliver, given)
        else:
            assert self.server is not None
            self.network.loop.run_in(self.server, self._read_at_server, deliver, given)

    def _read_at_server(self, deliver: Callable[..., None], given: Any) -> None:
        if not self._server_is_cut:
            deliver(*given)

    def _arrive_at_client(self, deliver: Callable[..., None], given: Any) -> None:
        if self._client_is_cut:
            return
        if self.network.is_blocked(self.client.name, self.server_host):
            self._hold(self._arrive_at_client, deliver, given)
        else:
            self.network.loop.run_in(self.client, self._read_at_client, deliver, given)

    def _read_at_client(self, deliver: Callable[..., None], given: Any) -> None:
        if not self._client_is_cut:
            deliver(*given)

    def _hold(self, arrive: Callable[..., None], deliver: Callable[..., None], given: Any) -> None:
        self.network.hold(self.client.name, self.server_host, lambda: arrive(deliver, given))

    def cut(self, why: str) -> None:
        """The connection is gone, for both ends; what is on its way to the handler may still be read by it."""
        self.network.calls.pop(self, None)
        loop, rng = self.network.loop, self.network.rng
        if not self._client_is_cut:
            self._client_is_cut = True
            loop.call_later(
                rng.expovariate(1e3), self.client_end.end, Code.UNAVAILABLE, why, context=self.client.context
            )
        if self.server_end is not None and self.server is not None and not self._server_is_cut:
            if rng.random() < 0.3:
                self.to_server(self.server_end.cancel)
            else:
                self._server_is_cut = True
                loop.call_later(rng.expovariate(1e3), self.server_end.cancel, context=self.server.context)

    def ended(self) -> None:
        """Either end has had its last word."""
        self.network.calls.pop(self, None)


_NOBODY = Process("the network").context


class ClientCall:
    """The client's end of a call of any kind, as grpc.aio's call objects behave."""

    def __init__(self, network: Network, address: str, path: str, serialize: Any, deserialize: Any) -> None:
        self._network = network
        self._serialize, self._deserialize = serialize, deserialize
        self._path = path
        self._responses: collections.deque[bytes] = collections.deque()
        self._outcome: tuple[Code, str, Any] | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._is_cancelled = False
        self._alarm: asyncio.TimerHandle | None = None
        self._early: list[Callable[[], None]] = []  # said before the call had reached its server
        self._call = Call(network, Process.current(), self, address, path.rpartition("/")[2])

    def begin(self, request: Any, timeout: float | None, metadata: Any) -> None:
        network, call = self._network, self._call
        loop = network.loop
        network.calls[call] = None
        call.server_host = call.address.partition(":")[0]
        if timeout is not None:
            self._alarm = loop.call_later(max(timeout, 0.0), self._too_late)
        data = None if request is None else self._serialize(request)
        delay_s = network.delay_s(call.client.name, call.server_host)
        delays_s = [delay_s]
        if network.mischief and data is not None and network.rng.random() < network.mischief:
            late_s = delay_s + network.rng.choice((0.01, 0.5, 2.0)) * network.rng.random()
            delays_s = network.rng.choice(([delay_s, late_s], [late_s]))
        for copy, after_s in enumerate(delays_s):
            at_s = loop.time() + after_s
            loop.call_at(at_s, self._reach, data, tuple(metadata), timeout, copy == 0, context=_NOBODY)
        if network.is_blocked(call.client.name, call.server_host):
            loop.call_later(CONNECT_S, self._not_connected, context=_NOBODY)

    def _not_connected(self) -> None:
        if self._call.server is None and self._network.is_blocked(self._call.client.name, self._call.server_host):
            self._call.cut("failed to connect to all addresses: connection timed out")

    def _reach(self, data: bytes | None, metadata: Any, timeout: float | None, is_first: bool) -> None:
        network, call = self._network, self._call
        if is_first and (call not in network.calls or self._outcome is not None):
            if not network.mischief or data is None:
                return  # broken, or cancelled before it left
            is_first = False  # given up by its caller, it comes all the same
        if network.is_blocked(call.client.name, call.server_host):
            again = (self._reach, data, metadata, timeout, is_first)
            network.hold(call.client.name, call.server_host, lambda: again[0](*again[1:]))
            return
        server = network.servers.get(call.address)
        if server is None:
            if is_first:
                call.cut("failed to connect to all addresses: Connection refused")
            return
        end = ServerCall(call if is_first else _Unheard(call), server, metadata, timeout)
        if is_first:
            call.server, call.server_end = server.process, end
            if server.process.is_stopped:
                network.loop.call_later(KEEPALIVE_S, self._not_answered, server.process, context=_NOBODY)
        network.loop.run_in(server.process, end.begin, self._path, data)
        if is_first:
            network.loop.run_in(call.client, self._wake)
            for early in self._early:
                early()
            self._early.clear()

    def _not_answered(self, process: Process) -> None:
        if process.is_stopped and self._call in self._network.calls:
            self._call.cut("keepalive watchdog timeout")

    def _send(self, act: str, *given: Any, is_message: bool = False) -> None:
        """To the handler; what is said before the call has reached it follows it."""
        call = self._call

        def send() -> None:
            assert call.server_end is not None
            call.to_server(getattr(call.server_end, act), *given, is_message=is_message)

        if call.server_end is not None:
            send()
        else:
            self._early.append(send)

    # ---- what the network tells ------------------------------------------------------------------------------------

    def deliver(self, data: bytes) -> None:
        if self._outcome is None:
            self._responses.append(data)
            self._wake()

    def end(self, code: Code, details: str = "", trailing: Any = ()) -> None:
        if self._outcome is not None:
            return
        self._outcome = (code, details, trailing)
        if code is Code.UNAVAILABLE:
            self._responses.clear()  # what was not read yet went with the connection
        if code in (Code.INTERNAL, Code.UNKNOWN):
            self._network.defects.append(f"{self._path} ended with {code.name}: {details}")
        if self._alarm is not None:
            self._alarm.cancel()
        self._call.ended()
        self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for news in waiters:
            if not news.done():
                news.set_result(None)

    def _too_late(self) -> None:
        if self._outcome is None:
            self._send("cancel")
            self._responses.clear()
            self.end(Code.DEADLINE_EXCEEDED, "Deadline Exceeded")

    # ---- what grpc.aio offers --------------------------------------------------------------------------------------

    def cancel(self) -> bool:
        if self._outcome is not None:
            return False
        self._is_cancelled = True
        self._send("cancel")
        self.end(Code.CANCELLED, "Locally cancelled by application!")
        return True

    def cancelled(self) -> bool:
        return self._is_cancelled

    def done(self) -> bool:
        return self._outcome is not None

    async def code(self) -> Code:
        return (await self._ended())[0]

    async def details(self) -> str:
        return (await self._ended())[1]

    async def initial_metadata(self) -> Any:
        return ()

    async def trailing_metadata(self) -> Any:
        return (await self._ended())[2]

    async def _ended(self) -> tuple[Code, str, Any]:
        while self._outcome is None:
            await self._something()
        return self._outcome

    async def _something(self) -> None:
        """Until there is news of the call."""
        news = self._network.loop.create_future()
        self._waiters.append(news)
        await news

    async def _next(self) -> Any:
        while not self._responses and self._outcome is None:
            try:
                await self._something()
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self._deserialize(self._responses.popleft()) if self._responses else grpc.aio.EOF

    def _raise_for_status(self) -> None:
        assert self._outcome is not None
        if self._is_cancelled:
            raise asyncio.CancelledError
        code, details, trailing = self._outcome
        if code is not Code.OK:
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)

    async def read(self) -> Any:
        response = await self._next()
        if response is grpc.aio.EOF:
            self._raise_for_status()
        return response

    async def write(self, request: Any) -> None:
        if self.done():
            raise asyncio.InvalidStateError("RPC already finished.")
        while self._call.server_end is None:  # it is not connected yet
            await self._something()
            if self.done():
                self._raise_for_status()
        self._send("receive", self._serialize(request), is_message=True)

    async def done_writing(self) -> None:
        if not self.done():
            self._send("half_close")

    def __await__(self) -> Generator[Any, None, Any]:
        return self._whole().__await__()

    async def _whole(self) -> Any:
        response = await self._next()
        if response is not grpc.aio.EOF:
            await self._ended()
        self._raise_for_status()
        return response

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (response := await self._next()) is not grpc.aio.EOF:
            yield response
        self._raise_for_status()


class _Unheard:
    """A call that was delivered a second time: the handler runs, and nobody hears what it says."""

    def __init__(self, call: Call) -> None:
        self.network = call.network

    def to_client(self, *_arguments: Any, **_options: Any) -> None:
        pass

    def ended(self) -> None:
        pass


class Server:
    """Stands in for Host: the product's guard around the product's handlers."""

    def __init__(self, network: Network, process: Process, address: str, key: str) -> None:
        self.process = process
        self.table: dict[str, grpc.RpcMethodHandler] = {}
        self.guard = HandlerGuard(Authenticator(key))
        self._collected: dict[str, dict[str, grpc.RpcMethodHandler]] = {}
        network.servers[address] = self

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: object, service: str, *, internal: bool) -> None:
        """As Host.add()."""
        add_to_server(servicer, self)
        for method, handler in self._collected[service].items():
            self.table[f"/{service}/{method}"] = self.guard.guard(handler, service, internal=internal)

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """They come by name below."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._collected[service] = handlers

    def set_serving(self, service: str, serving: bool) -> None:
        """Nobody asks for its health."""


class _Aborted(grpc.aio.AbortError):  # type: ignore[misc]
    pass


class ServerCall:
    """The handler's end; it is the handler's context, too."""

    def __init__(self, call: Any, server: Server, metadata: Any, timeout: float | None) -> None:
        self._call = call
        self._server = server
        self._loop: SimulatedLoop = call.network.loop
        self._metadata = metadata
        self._deadline_s = None if timeout is None else self._loop.time() + timeout
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._status: tuple[Code, str, Any] = (Code.OK, "", ())
        self._is_gone = False
        self._is_handoff = False

    def begin(self, path: str, data: bytes | None) -> None:
        self._is_handoff = path.endswith("/Handoff")
        handler = self._server.table.get(path)
        if handler is None:
            self._call.to_client(self._call.client_end.end, Code.UNIMPLEMENTED, "Method not found!")
            return
        self._task = self._loop.spawn(self._server.process, self._run(handler, data), name=path)

    def receive(self, data: bytes) -> None:
        if self._is_handoff:
            self._is_handoff = False
            self._call.network.begun.append((self._call.address, data))
        self._requests.put_nowait(data)

    def half_close(self) -> None:
        self._requests.put_nowait(None)

    def cancel(self) -> None:
        if self._task is not None and not self._task.done():
            self._is_gone = True
            self._task.cancel()
        self._call.ended()

    async def _run(self, handler: grpc.RpcMethodHandler, data: bytes | None) -> None:
        function = handler.unary_unary or handler.unary_stream or handler.stream_stream
        self._serialize = handler.response_serializer
        try:
            response = await function(self._each() if handler.request_streaming else data, self)
            if not handler.response_streaming:
                await self.write(response)
        except _Aborted:
            pass
        except asyncio.CancelledError:
            self._status = (Code.CANCELLED, "CANCELLED", ())
        if not self._is_gone:
            self._call.to_client(getattr(self._call, "client_end", self).end, *self._status)

    def end(self, *_status: Any) -> None:
        """Of a call that nobody hears."""

    async def _each(self) -> AsyncIterator[bytes]:
        while (data := await self._requests.get()) is not None:
            yield data

    # ---- what grpc.aio offers --------------------------------------------------------------------------------------

    async def write(self, response: Any) -> None:
        if not self._is_gone and isinstance(self._call, Call):
            self._call.to_client(self._call.client_end.deliver, self._serialize(response), is_message=True)

    async def abort(self, code: Code, details: str = "", trailing_metadata: Any = ()) -> None:
        self._status = (code, details, trailing_metadata)
        raise _Aborted

    def invocation_metadata(self) -> Any:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._loop.time())

    def done(self) -> bool:
        return self._task is not None and self._task.done()

    def cancelled(self) -> bool:
        return self._is_gone
