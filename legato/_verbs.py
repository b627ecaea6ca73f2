"""What both clients prepare alike before anything is sent."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from legato import _request, _rpc, _views
from legato._exchange import Endpoints, Exchange
from legato._request import Prompt
from legato._retry import Backoff, Retries
from legato.errors import InvalidParameter
from legato.types import ClusterView, Message, Model
from legato.v1 import inference_pb2

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, slots=True)
class Unary:
    """A call with one reply: what to send, and how the reply reads."""

    service: str  # "Inference" or "Cluster"
    method: str
    request: Any
    read: Callable[[Any], Any]


class Verbs:
    """The settings of a client, and its requests, built but not sent."""

    def __init__(self, address: str, timeout_s: float, api_key: str | None, retries: Retries) -> None:
        self.endpoints = Endpoints(_rpc.addresses_of(address))
        self.timeout_s = _seconds(timeout_s)
        self.api_key = _api_key(api_key)
        self.retries = retries

    def generate(
        self, prompt: Prompt, model: str, timeout_s: float | None, request_id: str, sampling: dict[str, Any]
    ) -> Exchange:
        options = self._options(request_id, sampling)
        return self._exchange("Generate", _request.generate_request(prompt, model, options), timeout_s)

    def chat(
        self,
        messages: Iterable[Message],
        model: str,
        timeout_s: float | None,
        request_id: str,
        sampling: dict[str, Any],
    ) -> Exchange:
        options = self._options(request_id, sampling)
        return self._exchange("Chat", _request.chat_request(messages, model, options), timeout_s)

    def tokenize(self, text: str | Iterable[Message], model: str) -> Unary:
        return Unary(
            "Inference", "Tokenize", _request.tokenize_request(text, model), lambda reply: list(reply.token_ids)
        )

    def detokenize(self, token_ids: Iterable[int], model: str) -> Unary:
        request = _request.detokenize_request(token_ids, model)
        return Unary("Inference", "Detokenize", request, lambda reply: str(reply.text))

    def models(self) -> Unary:
        read: Callable[[Any], list[Model]] = _views.models_of
        return Unary("Inference", "ListModels", inference_pb2.ListModelsRequest(), read)

    def cluster(self) -> Unary:
        read: Callable[[Any], ClusterView] = _views.cluster_of
        return Unary("Cluster", "GetCluster", inference_pb2.GetClusterRequest(), read)

    def backoff(self, timeout_s: float | None) -> tuple[Backoff, float]:
        """For a call with one reply, which is safe to send again; and its deadline by the monotonic clock."""
        deadline_s = time.monotonic() + (self.timeout_s if timeout_s is None else _seconds(timeout_s))
        return Backoff(self.retries, len(self.endpoints.addresses), deadline_s), deadline_s

    def metadata(self) -> list[tuple[str, str]]:
        return _rpc.metadata_of(self.api_key, None)

    def _options(self, request_id: str, sampling: dict[str, Any]) -> inference_pb2.AnswerOptions:
        options = _request.answer_options(**sampling)
        options.request_id = _request.name_request(request_id)
        return options

    def _exchange(self, method: str, request: Any, timeout_s: float | None) -> Exchange:
        seconds = self.timeout_s if timeout_s is None else _seconds(timeout_s)
        return Exchange(method, request, self.endpoints, self.retries, seconds, self.api_key)


def _seconds(timeout_s: object) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise InvalidParameter(
            f"timeout_s must be a finite number of seconds above 0, is {timeout_s!r}", details={"field": "timeout_s"}
        )
    return float(timeout_s)


def _api_key(api_key: object) -> str | None:
    """It travels as a header. The key itself is in no message."""
    if api_key is None or (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
        return api_key
    raise InvalidParameter("api_key must be printable ASCII", details={"field": "api_key"})
