"""Client of a Legato cluster.

    import legato

    with legato.Client("localhost:50051") as client:
        for piece in client.stream("Once upon a time", max_tokens=64):
            print(piece.text, end="")

Names are loaded at their first use: `import legato` alone, which `legato.v1` (the wire) brings with it, loads no gRPC.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from legato._aio import AsyncClient, AsyncStream
    from legato._client import Client, Stream
    from legato._retry import Retries
    from legato.errors import LegatoError
    from legato.types import Adapter, Answer, Choice, Ledger, Message, Model, Piece, Route, TokenLogprobs, Usage

__all__ = [
    "Adapter",
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Ledger",
    "LegatoError",
    "Message",
    "Model",
    "Piece",
    "Retries",
    "Route",
    "Stream",
    "TokenLogprobs",
    "Usage",
]

_HOME = {"AsyncClient": "_aio", "AsyncStream": "_aio", "Client": "_client", "Stream": "_client", "Retries": "_retry"}


def __getattr__(name: str) -> object:
    if name == "errors":
        return importlib.import_module("legato.errors")
    if name not in __all__:
        raise AttributeError(f"module 'legato' has no attribute {name!r}")
    if (
        name in _HOME
    ):  # gRPC reads this at its import; what it logs (a router that goes away, say) comes as an error too
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    home = _HOME.get(name, "errors" if name == "LegatoError" else "types")
    return getattr(importlib.import_module(f"legato.{home}"), name)


def __dir__() -> list[str]:
    return [*__all__, "errors"]
