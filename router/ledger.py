"""The stage times of one answer, and who ran it. Boundaries never go back, whatever other machines' clocks say."""

from __future__ import annotations

import time

from legato.v1 import common_pb2, worker_pb2

BOUNDARIES = (
    "sent_ns",
    "prefill_queued_ns",
    "prefill_started_ns",
    "first_token_ns",
    "handed_over_ns",
    "decode_started_ns",
    "second_token_ns",
)


class Ledger:
    """Passes the boundaries in their order. `sent_ns` is when the router got the request; a client puts its own."""

    def __init__(self, router_id: str, received_ns: int) -> None:
        self.times = common_pb2.StageTimes(sent_ns=received_ns)
        self.route = common_pb2.Route(router_id=router_id)
        self._passed = 1
        self._stood_ns = 0
        self._last_ns = received_ns

    @property
    def tokens_timed(self) -> int:
        """0, 1 or 2: stages of the first two tokens are what it knows."""
        return {1: 0, 4: 1}.get(self._passed, 2)

    def stood(self, now_ns: int) -> None:
        """It stands in the router's line, for a worker with room: from here on it queues."""
        if not self._stood_ns:
            self._stood_ns = now_ns

    def prefilled(self, first: worker_pb2.PrefillEvent.FirstToken) -> None:
        """A prefill worker drew a token. As the answer's second, after a failover, all the loss is in the hand-over."""
        self._token(self._queued_ns(first.queued_ns), first.started_ns, first.drawn_ns)
        self.route.prefill_cached_tokens = first.cached_tokens

    def decoded(self, output: worker_pb2.SequenceOutput, count: int) -> None:
        """A decode worker drew `count` tokens; with the first that it draws for a sequence come its times."""
        if self.tokens_timed == 0:
            # it prefilled the sequence itself
            self._token(self._queued_ns(output.queued_ns), output.started_ns, output.drawn_ns)
            self.route.prefill_cached_tokens = output.cached_tokens
            count -= 1
        if count and self.tokens_timed == 1:
            self._token(output.handed_over_ns, output.started_ns, output.drawn_ns or time.time_ns())

    def moved(self, decode_worker_id: str) -> None:
        self.route.decode_worker_id = decode_worker_id
        self.route.moves += 1

    def _queued_ns(self, on_worker_ns: int) -> int:
        """Of the first token, the line here counts too; of a later one, only that of the worker that goes on."""
        return self._stood_ns if self.tokens_timed == 0 and self._stood_ns else on_worker_ns

    def _token(self, *boundaries_ns: int) -> None:
        """Three boundaries; 0 = it passed none there, the stage is empty."""
        if self.tokens_timed == 2:
            return
        for boundary_ns in boundaries_ns:
            self._last_ns = max(self._last_ns, boundary_ns)
            setattr(self.times, BOUNDARIES[self._passed], self._last_ns)
            self._passed += 1
