"""Sampling where every rank of a group holds the logits of its own run of the vocabulary: whole logits never move.

The token is the one that engine/sampling.py draws from the whole row, bit for bit: each token's number in the race is
its own, and what the filters compare arrives whole. What moves, per row and rank:

    greedy, no filter the greatest key of the race and its token
    top-k             the rank's k likeliest
    top-p, min-p      the scores that can pass: for top-p, masses by size are summed first, and say how small one in the
                      nucleus can be
    log-probabilities greatest, sum of exponentials, the token's own and the k likeliest

Every rank of the group calls the same with the same draws, and finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.groups import Groups
from engine.sampling import (
    Mask,
    adjusted,
    argmax,
    draw,
    forced,
    likeliest,
    needs_row,
    race_inputs,
    token_logprobs,
)
from kernels.sampling import MASS_BITS, masses, sample
from scheduler.plan import NO_TOKEN, Draw, Drawn, TokenLogprobs
from spec.sampling import SamplingParams
from spec.shard import split

Floats = NDArray[np.float64]

_SIZES = 4 * MASS_BITS + 2  # of masses, by a quarter of a power of two; the last takes those of 0
_ROUNDING = 1e-9  # far above what summing a vocabulary in another order can change, relative to the sum
_HALF_BITS = 32


class Sampler:
    """`groups.shard.vocab` is the rank's run of the vocabulary. A rank alone has all of it, and nothing moves."""

    def __init__(self, groups: Groups, vocab_size: int) -> None:
        self._groups, self._vocab_size = groups, vocab_size
        tp = groups.shard.layout.tp
        self._runs = [split(vocab_size, tp, index) for index in range(tp)]
        self._own = self._runs[groups.shard.index]
        assert self._own == groups.shard.vocab

    def draw(
        self,
        logits: torch.Tensor,
        draws: Sequence[Draw],
        allowed: Sequence[Mask | None] | None = None,
        best: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> list[Drawn]:
        """logits: [len(draws), the rank's vocabulary] float32; allowed: of the same tokens, as draw() takes them. best:
        as there, where a rank alone has the whole vocabulary. A row without a finite maximum draws NO_TOKEN."""
        if len(self._runs) == 1 or not draws:
            return draw(logits, draws, allowed, best)
        assert best is None
        if not any(needs_row(each) for each in draws):
            indices, values = argmax(logits)
            each_best = self._gather(
                logits, np.stack((values.astype(np.float64), indices + float(self._own.start)), axis=1)
            )
            greedy = [_greatest(each_best[:, row]) for row in range(len(draws))]
            return [Drawn(t if t == NO_TOKEN else forced(each, t)) for (t, _), each in zip(greedy, draws, strict=True)]
        token_ids = self._drawn(adjusted(logits, draws, allowed, self._own.start), draws)
        token_ids = [t if t == NO_TOKEN else forced(each, t) for t, each in zip(token_ids, draws, strict=True)]
        asked = [
            (row, (token_ids[row], each.params.logprobs))
            for row, each in enumerate(draws)
            if each.params.logprobs is not None and token_ids[row] != NO_TOKEN
        ]
        scored = self.token_logprobs(logits[[row for row, _ in asked]], [pair for _, pair in asked])
        by_row = dict(zip((row for row, _ in asked), scored, strict=True))
        return [Drawn(token_id, by_row.get(row)) for row, token_id in enumerate(token_ids)]

    def token_logprobs(self, logits: torch.Tensor, asked: Sequence[tuple[int, int]]) -> list[TokenLogprobs]:
        """logits: [len(asked), the rank's vocabulary], the model's own. Of (token id, how many of the likeliest) each:
        natural logarithm of softmax in float64."""
        if not asked:
            return []
        rows = logits.cpu().numpy()
        if len(self._runs) == 1:
            return [
                token_logprobs(row, token_id, num_top) for row, (token_id, num_top) in zip(rows, asked, strict=True)
            ]
        width = max(num_top for _, num_top in asked)
        own = np.full((len(asked), 3 + 2 * min(width, max(map(len, self._runs)))), -1.0)
        for row, (logit, (token_id, num_top)) in enumerate(zip(rows, asked, strict=True)):
            wide = logit.astype(np.float64)
            greatest = wide.max()
            here = token_id in self._own
            own[row, :3] = greatest, np.exp(wide - greatest).sum(), wide[token_id - self._own.start] if here else 0.0
            self._put_likeliest(own[row, 3:], wide, num_top)
        gathered = self._gather(logits, own)
        return [self._merged_logprobs(gathered[:, row], *pair) for row, pair in enumerate(asked)]

    def _merged_logprobs(self, parts: Floats, token_id: int, num_top: int) -> TokenLogprobs:
        """parts: [ranks, (greatest, sum, the token's logit, the likeliest)]"""
        greatest = parts[:, 0].max()
        log_sum = math.log(float((parts[:, 1] * np.exp(parts[:, 0] - greatest)).sum()))
        owner = next(index for index, run in enumerate(self._runs) if token_id in run)
        values, ids = _put_together(parts[:, 3:])
        top = likeliest(values, min(num_top, values.size))
        logprobs = values[top] - greatest - log_sum
        return TokenLogprobs(
            float(parts[owner, 2] - greatest - log_sum), tuple(zip(ids[top].tolist(), logprobs.tolist(), strict=True))
        )

    # ---- a step in which not every row is greedy -------------------------------------------------------------------

    def _drawn(self, scores: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
        """The token of each row, before teacher forcing."""
        options, streams = race_inputs(draws, scores.device)
        filtered = {row: each.params for row, each in enumerate(draws) if self._filters(each.params)}
        token_ids = self._race(scores, options, streams, filtered)
        if filtered:
            rows = list(filtered)
            inputs = scores[rows].cpu(), options[rows].cpu(), streams[rows].cpu()
            found = self._draw_filtered(scores, *inputs, list(filtered.values()))
            for row, token_id in zip(rows, found, strict=True):
                token_ids[row] = token_id
        return token_ids

    def _filters(self, params: SamplingParams) -> bool:
        return params.temperature != 0.0 and (bool(self._top_k(params)) or params.top_p < 1.0 or params.min_p > 0.0)

    def _top_k(self, params: SamplingParams) -> int:
        """0: the choice is among the whole vocabulary."""
        return params.top_k if params.top_k < self._vocab_size else 0

    def _race(
        self, scores: torch.Tensor, options: torch.Tensor, streams: torch.Tensor, filtered: Mapping[int, object]
    ) -> list[int]:
        """Tokens of the rows that no filter touches; of the `filtered` ones something."""
        if len(filtered) == len(scores):
            return [NO_TOKEN] * len(scores)
        drawn, keys = sample(scores, options, streams, self._own.start)
        each_best = self._gather(scores, np.stack((keys.cpu().numpy(), drawn.cpu().numpy().astype(np.float64)), axis=1))
        return [_greatest(each_best[:, row])[0] for row in range(len(scores))]

    def _draw_filtered(
        self,
        like: torch.Tensor,
        scores: torch.Tensor,
        options: torch.Tensor,
        streams: torch.Tensor,
        asked: list[SamplingParams],
    ) -> list[int]:
        """What moves is on the device of `like`; the rest is on the CPU. The token of each row."""
        rows = scores.numpy()
        places, greatest = rows.argmax(axis=1), np.empty(len(asked))
        best = np.stack((rows[np.arange(len(asked)), places].astype(np.float64), places + float(self._own.start)), 1)
        gathered = self._gather(like, best)
        token_ids = [NO_TOKEN] * len(asked)
        for row in range(len(asked)):
            token_ids[row], greatest[row] = _greatest(gathered[:, row])
        sound = [row for row, token_id in enumerate(token_ids) if token_id != NO_TOKEN]
        totals, gaps = self._nucleus_bounds(like, scores, greatest, {row: asked[row] for row in sound})
        passing = []
        for row in sound:
            params = asked[row]
            if top_k := self._top_k(params):
                passing.append(np.sort(likeliest(rows[row], min(top_k, len(self._own)))))
            else:
                passing.append(np.flatnonzero(rows[row] >= greatest[row] + max(gaps[row], float(options[row, 3]))))
        for row, (candidates, ids) in zip(sound, self._candidates(like, rows[sound], passing), strict=True):
            inputs = torch.from_numpy(candidates)[None], options[[row]], streams[[row]]
            total = torch.tensor([totals.get(row, 0)])
            token_ids[row] = int(sample(*inputs, ids=torch.from_numpy(ids), totals=total)[0])
        return token_ids

    def _nucleus_bounds(
        self, like: torch.Tensor, scores: torch.Tensor, greatest: Floats, asked: dict[int, SamplingParams]
    ) -> tuple[dict[int, int], dict[int, float]]:
        """Of the rows with top-p and no top-k: mass of the whole vocabulary, and the least score - greatest that the
        nucleus can have (-inf for every other row)."""
        gaps = dict.fromkeys(asked, -math.inf)
        nuclei = [row for row, params in asked.items() if params.top_p < 1.0 and not self._top_k(params)]
        if not nuclei:
            return {}, gaps
        own = np.zeros((len(nuclei), 2 + _SIZES))  # whole numbers below 2^53: their sums are exact
        for place, row in enumerate(nuclei):
            each = masses(scores[row], float(greatest[row]), asked[row].temperature).numpy()
            own[place, :2] = divmod(int(each.sum()), 1 << _HALF_BITS)
            own[place, 2:] = np.bincount(_sizes(each), each, _SIZES)
        summed = self._sum(like, own)
        totals: dict[int, int] = {}
        for place, row in enumerate(nuclei):
            params = asked[row]
            totals[row] = (int(summed[place, 0]) << _HALF_BITS) + int(summed[place, 1])
            least = _least_by_size(summed[place, 2:], params.top_p * totals[row]) - 1
            if least > 0:
                gaps[row] = params.temperature * (math.log(least) - MASS_BITS * math.log(2.0) - 1e-6)
        return totals, gaps

    def _put_likeliest(self, into: Floats, scores: Floats, count: int) -> None:
        """into: [2 · n], filled with -1: values, then token ids; both by rising id."""
        top = np.sort(likeliest(scores, min(count, scores.size)))
        into[: top.size] = scores[top]
        into[into.size // 2 :][: top.size] = top + self._own.start

    def _candidates(
        self, logits: torch.Tensor, scores: NDArray[np.float32], passing: list[NDArray[np.int64]]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """For each row scores and token ids of what passes on any rank, by rising id."""
        if not passing:
            return []
        counts = self._gather(logits, np.array([[each.size for each in passing]], np.float64))[:, 0].astype(int)
        own = np.concatenate(
            [
                np.stack((score[index].astype(np.float64), index + float(self._own.start)), axis=1)
                for score, index in zip(scores, passing, strict=True)
            ]
        )
        sizes: list[int] = counts.sum(axis=1).tolist()
        parts = self._gathered(logits, own, sizes)
        cut = [np.split(part, np.cumsum(count)[:-1]) for part, count in zip(parts, counts, strict=True)]
        rows = [np.concatenate(pieces) for pieces in zip(*cut, strict=True)]
        return [(row[:, 0].astype(np.float32), row[:, 1].astype(np.int64)) for row in rows]

    # ---- between the ranks -----------------------------------------------------------------------------------------

    def _gather(self, logits: torch.Tensor, own: Floats) -> Floats:
        """[ranks, *own.shape]"""
        return np.stack(self._gathered(logits, own, [own.shape[0]] * len(self._runs)))

    def _gathered(self, logits: torch.Tensor, own: Floats, sizes: list[int]) -> list[Floats]:
        return [part.cpu().numpy() for part in self._groups.gather(torch.from_numpy(own).to(logits.device), sizes)]

    def _sum(self, logits: torch.Tensor, own: Floats) -> Floats:
        found: Floats = self._groups.sum(torch.from_numpy(own).to(logits.device)).cpu().numpy()
        return found


def _greatest(parts: Floats) -> tuple[int, float]:
    """parts: [ranks, (greatest score or key, its token id)]; of equals the lower id, NO_TOKEN where none is finite."""
    values = parts[:, 0]
    rank = int(values.argmax())  # a NaN counts as the greatest
    return (int(parts[rank, 1]) if math.isfinite(values[rank]) else NO_TOKEN), float(values[rank])


def _put_together(parts: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """parts: [ranks, (values, ids)] as _put_likeliest writes them; both in one row, by rising id."""
    half = parts.shape[1] // 2
    ids = parts[:, half:].ravel()
    real = ids >= 0
    return parts[:, :half].ravel()[real], ids[real].astype(np.int64)


def _sizes(each: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of masses up to 2^MASS_BITS: 0 for that, and one more for every quarter of a power of two below it."""
    found: NDArray[np.int64] = ((1023 + MASS_BITS) << 2) - (each.astype(np.float64).view(np.int64) >> 50)
    return np.minimum(found, _SIZES - 1)


def _least_by_size(by_size: Floats, wanted: float) -> float:
    """The smallest mass that can be needed for the greatest masses to sum to `wanted`."""
    reached = int(np.searchsorted(np.cumsum(by_size), wanted * (1.0 + _ROUNDING)))
    if reached >= _SIZES - 1:
        return 0.0
    lower_edge = np.array([((1023 + MASS_BITS) << 2) - reached], np.int64) << 50
    return float(lower_edge.view(np.float64)[0])
