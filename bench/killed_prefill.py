"""What each client sees when a prefill worker is killed (SIGKILL) while it computes.

Clients send long prompts at once. When one of them has its second token, and so is decoding, the worker dies: others'
prompts are being read or wait; a moment later one more client comes. Whether the tokens are right is judged by the
model itself in float32 (transformers): along the answer, how far below the likeliest token each drawn one lay.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.heard import Heard, hear
from bench.pools import Pools

LATER_S = 0.5
_POLL_S = 0.002
# Between logits. Rounding to bfloat16 moves them by some tenths; tokens of another context lie several apart.
RIGHT_WITHIN = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """By one client."""

    heard: Heard
    killed_s: float  # since it was sent; negative: it came later
    tokens_before: int

    @property
    def was(self) -> str:
        if self.killed_s < 0.0:
            return f"sent {-self.killed_s:.1f} s later"
        return f"decoding, {self.tokens_before} tokens" if self.tokens_before else "waits for its first token"

    @property
    def next_token_s(self) -> float | None:
        """From the kill, or from sending if that was later, to the next token; None: there was none."""
        since_s = max(self.killed_s, 0.0)
        return next((time_s - since_s for time_s in self.heard.times_s[self.tokens_before :]), None)

    @property
    def end_s(self) -> float:
        """From the kill, or from sending if that was later, to the end, whatever it was."""
        return self.heard.ended_s - max(self.killed_s, 0.0)


async def kill_prefill_while_serving(
    pools: Pools, prompts: Sequence[list[int]], num_tokens: int, timeout_s: float
) -> list[Seen]:
    """The last prompt is the late client's."""
    early = [Heard(prompt, num_tokens) for prompt in prompts[:-1]]
    tasks = [asyncio.create_task(hear(pools, heard, timeout_s)) for heard in early]
    while max(len(heard.times_s) for heard in early) < 2 and not all(task.done() for task in tasks):
        await asyncio.sleep(_POLL_S)
    before = [len(heard.token_ids) for heard in early]
    killed_at_s = time.perf_counter()
    pools.kill_prefill()
    await asyncio.sleep(LATER_S)
    late = Heard(prompts[-1], num_tokens)
    await asyncio.gather(*tasks, hear(pools, late, timeout_s))
    return [
        Seen(heard, killed_at_s - heard.sent_s, tokens)
        for heard, tokens in zip([*early, late], [*before, 0], strict=True)
    ]


class Referee:
    """The model of a Hugging Face folder in float32, by transformers."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def gap(self, heard: Heard) -> float:
        """The farthest that a drawn token's logit lies below the likeliest token's, the text before it being that of
        the answer. 0: every token is the greedy one; at most RIGHT_WITHIN: right but for rounding."""
        if not heard.token_ids:
            return 0.0
        token_ids = torch.tensor(heard.token_ids)
        text = torch.cat([torch.tensor(heard.prompt), token_ids[:-1]])
        logits = self._model(text[None], logits_to_keep=len(token_ids)).logits[0]  # [tokens, vocabulary]
        drawn = logits.gather(1, token_ids[:, None])[:, 0]
        return float((logits.max(dim=1).values - drawn).max())
