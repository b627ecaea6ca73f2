"""Constraints of clients, tried out in another process before anybody here compiles them.

service/grammar.py says why. The process (service/sandbox_process.py) is started for the first constraint of a model,
again if it dies, and ends with close(), or with this process, whose end closes its standard input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import sys
from pathlib import Path

from service import logs
from service.grammar import Vocabulary
from spec.constraint import Constraint
from spec.errors import Overloaded

logger = logs.get(__name__)

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 15.0  # the vocabulary is read first


class Sandbox:
    """Of one vocabulary. Owned by the process; for one event loop."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._asked: dict[int, asyncio.Future[str]] = {}
        self._ids = itertools.count()
        self._starting = asyncio.Lock()

    async def check(self, constraint: Constraint) -> None:
        """Raises InvalidParameter for one that cannot be kept to; Overloaded when that could not be found out."""
        async with self._starting:
            if self._process is None:
                await self._start()
        assert self._process is not None and self._process.stdin is not None
        request_id = next(self._ids)
        answer = self._asked[request_id] = asyncio.get_running_loop().create_future()
        request = {"id": request_id, "kind": constraint.kind, "texts": constraint.texts}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        try:
            async with asyncio.timeout(WAIT_S):
                refusal = await answer
        except TimeoutError:
            raise Overloaded("too many constraints are waiting to be looked at") from None
        finally:
            del self._asked[request_id]
        if refusal:
            raise constraint.refusal(refusal)

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service.sandbox_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(self._vocabulary)).encode() + b"\n")
        self._reading = asyncio.create_task(self._read(self._process), name="constraint sandbox")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            answer = json.loads(line)
            if (asked := self._asked.get(answer["id"])) is not None and not asked.done():
                asked.set_result(answer["refusal"])
        logger.warning("the process that tries constraints out has ended with %s", await process.wait())
        self._process = None
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(Overloaded("the process that tries constraints out has ended"))

    async def close(self) -> None:
        process = self._process
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
