"""One run: look at the cluster, warm up, load it, and keep what was seen."""

from __future__ import annotations

import dataclasses
from typing import Any

from legato.bench.load import Load, Sending
from legato.bench.prompts import PromptBook, TokenTexts, read_prompts
from legato.bench.settings import Plan, Settings, plan
from legato.errors import UnknownModel
from legato.types import ClusterView, Model

# Of requests that warm up: their prompts are none of those that are measured.
WARMUP_INDEX = 1 << 40


@dataclasses.dataclass
class Run:
    """Filled as it goes, so that one who stops it has what was measured so far. `load` None: nothing was yet."""

    settings: Settings
    model: Model | None = None
    cluster: ClusterView | None = None
    plan: Plan | None = None
    stage: str = "connecting"
    load: Load | None = None
    is_interrupted: bool = False

    async def measure(self, client: Any) -> None:
        """`client` is a legato.AsyncClient that does not send again what failed. Raises classes of legato.errors where
        the run cannot begin; what fails later is a figure of it."""
        settings = self.settings
        texts = read_prompts(settings.prompts)
        self.model = await _served(client, settings.model)
        self.cluster = await client.cluster()
        self.plan = plan(settings, self.model.max_context_tokens)
        self.stage = "preparing prompts"
        tokens = await TokenTexts.ask(client, self.model.id, texts, settings.seed) if settings.needs_tokens else None
        book = PromptBook(self.model, texts, tokens, settings.seed, settings.nonce, self.plan.block_tokens)
        sending = Sending(
            self.model.id,
            settings.temperature,
            settings.speculation,
            settings.exact_length,
            settings.timeout_s,
            settings.seed,
        )
        if self.plan.warmup:
            self.stage = "warming up"
            warmup = Load(client, book, sending, first_index=WARMUP_INDEX)
            await warmup.closed_loop(self.plan.warmup, settings.users)
            _begin_only_if_answered(warmup)
        self.stage = "measuring"
        self.load = Load(client, book, sending)
        if settings.kind == "closed":
            await self.load.closed_loop(self.plan.arrivals, settings.users, settings.duration_s)
        else:
            await self.load.open_loop(self.plan.arrivals)


async def _served(client: Any, name: str) -> Model:
    models: list[Model] = await client.models()
    found = [one for one in models if name in ("", one.id)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(one.id for one in models) or "none"
    asked = f"{name!r} is not served" if name else "--model must say which"
    raise UnknownModel(f"{asked}; the cluster serves {known}", details={"field": "model"})


def _begin_only_if_answered(warmup: Load) -> None:
    """Where not one request of the warm-up was answered, the run would measure nothing."""
    last = warmup.records[-1].error
    if warmup.finished == 0 and last is not None:
        last.message = f"no request of the warm-up was answered: {last.message}"
        raise last
