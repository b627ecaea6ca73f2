"""What a scheduler is told, and what it tells of itself."""

from __future__ import annotations

import dataclasses

from spec.errors import InvalidConfiguration


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    num_blocks: int
    block_tokens: int
    max_step_tokens: int  # a step computes at most this many (the chunk size)
    max_sequences: int  # slices of a step at most
    max_context_tokens: int  # the model's; prompt and output of one sequence
    max_waiting: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""  # names whose KV it is: model, revision, dtype; adapters add their own id
    prefix_caching: bool = True
    draft_model: bool = False  # the engine has one to guess with
    group: int = 0  # the one of the worker's groups whose blocks are scheduled
    steps_out: int = 1  # plans that are out at once, on their way through pipeline stages

    def __post_init__(self) -> None:
        for field in ("num_blocks", "block_tokens", "max_sequences", "max_waiting", "steps_out"):
            if getattr(self, field) < 1:
                raise InvalidConfiguration(f"{field} must be at least 1, is {getattr(self, field)}")
        if self.max_step_tokens < self.max_sequences:
            raise InvalidConfiguration(
                f"max_step_tokens ({self.max_step_tokens}) must be at least max_sequences ({self.max_sequences}), "
                "or a step could not hold a token of each"
            )
        if self.max_context_tokens < 2:
            raise InvalidConfiguration(f"max_context_tokens must be at least 2, is {self.max_context_tokens}")


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    waiting: int
    running: int
    held: int
    waiting_tokens: int  # known tokens whose KV is still to be computed, of waiting and running sequences
    free_blocks: int  # free, or cached and evictable
    total_blocks: int


@dataclasses.dataclass(frozen=True, slots=True)
class HandoffConfig:
    max_reservations: int  # on their way; those that wait for a lost writer cost their blocks alone
    max_context_tokens: int  # a sequence must have room for one more token than is handed over
    lease_s: float = 5.0
    tombstones: int = 4096  # ended reservations of which it is remembered how they ended
    group: int = 0  # the one of the worker's groups whose blocks are reserved

    def __post_init__(self) -> None:
        if self.max_reservations < 1 or self.tombstones < 1 or not self.lease_s > 0:
            raise InvalidConfiguration("max_reservations, tombstones and lease_s must be above 0")
