"""Constraints that requests bring, tried out once each before a worker hears of them."""

from __future__ import annotations

from collections import OrderedDict

from router.registry import Model
from service.grammar import Vocabulary
from service.sandbox import Sandbox
from spec.constraint import Constraint

MAX_REMEMBERED = 1024  # of up to 64 KiB each
MAX_SANDBOXES = 4


class Constraints:
    """A sandbox for each model that is asked for with constraints. Those that came through are remembered."""

    def __init__(self) -> None:
        self._sandboxes: OrderedDict[bytes, Sandbox] = OrderedDict()
        self._passed: OrderedDict[tuple[bytes, Constraint], None] = OrderedDict()

    async def check(self, constraint: Constraint, model: Model) -> None:
        """Raises InvalidParameter for one that cannot be kept to, Overloaded when that could not be found out."""
        key = model.identity.SerializeToString(deterministic=True)
        if (key, constraint) in self._passed:
            self._passed.move_to_end((key, constraint))
            return
        await (await self._sandbox(key, model)).check(constraint)
        self._passed[key, constraint] = None
        if len(self._passed) > MAX_REMEMBERED:
            self._passed.popitem(last=False)

    async def _sandbox(self, key: bytes, model: Model) -> Sandbox:
        if key not in self._sandboxes:
            vocabulary = Vocabulary(model.tokenizer.definition, model.vocab_size, tuple(sorted(model.eos_token_ids)))
            self._sandboxes[key] = Sandbox(vocabulary)
        self._sandboxes.move_to_end(key)
        found = self._sandboxes[key]
        if len(self._sandboxes) > MAX_SANDBOXES:
            _, longest_unused = self._sandboxes.popitem(last=False)
            await longest_unused.close()
        return found

    async def close(self) -> None:
        for sandbox in self._sandboxes.values():
            await sandbox.close()
