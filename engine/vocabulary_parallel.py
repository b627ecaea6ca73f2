"""Sampling where every rank of a group holds the logits of its own run of the vocabulary: whole logits never move.

The token is the one that engine/sampling.py draws from the whole row, bit for bit: sums are taken over the same groups
of neighbours, and what the filters look at arrives in the same order. What moves, per row and rank:

    greedy            the greatest score and its id
    top-k             the rank's k likeliest
    top-p, min-p      the weights that can pass: for top-p, masses by size of weight are summed first, and say how small
                      a weight of the nucleus can be
    none of these     one sum per group of 256 neighbours; then the weights of the one group in which the draw falls
    log-probabilities greatest, sum of exponentials, the token's own and the k likeliest

Every rank of the group calls the same with the same draws, and finds the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.groups import Groups
from engine.philox import uniform
from engine.sampling import (
    GROUP,
    Floats,
    Mask,
    argmax,
    draw,
    find_group,
    find_in_group,
    forced,
    group_sums,
    least_nucleus_weight,
    likeliest,
    needs_row,
    penalized,
    sample_likeliest,
    sample_weights,
    token_logprobs,
)
from scheduler.plan import NO_TOKEN, Draw, Drawn, TokenLogprobs
from spec.sampling import SamplingParams
from spec.shard import split

_MASSES = 256  # of weights in (2^-64, 1], by a quarter of a power of two; the last takes all below
_ROUNDING = 1e-9  # far above what summing a vocabulary in another order can change, relative to the sum


class Sampler:
    """`groups.shard.vocab` is the rank's run of the vocabulary. A rank alone has all of it, and nothing moves."""

    def __init__(self, groups: Groups, vocab_size: int) -> None:
        self._groups, self._vocab_size = groups, vocab_size
        tp = groups.shard.layout.tp
        self._runs = [split(vocab_size, tp, index) for index in range(tp)]
        self._own = self._runs[groups.shard.index]
        assert self._own == groups.shard.vocab
        self._whole_groups, self._cut_groups = _groups_of(self._runs, self._own, vocab_size)

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
        rows = logits.cpu().numpy()
        masks = allowed or [None] * len(draws)
        scores = [penalized(*row, self._own.start) for row in zip(rows, draws, masks, strict=True)]
        token_ids = self._drawn(logits, scores, draws)
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

    def _drawn(self, logits: torch.Tensor, scores: list[Floats], draws: Sequence[Draw]) -> list[int]:
        """The token of each row, before teacher forcing."""
        top_ks = [self._top_k(each.params) for each in draws]
        own = np.full((len(draws), 2 + 2 * min(max(top_ks), max(map(len, self._runs)))), -1.0)
        for row, (score, top_k) in enumerate(zip(scores, top_ks, strict=True)):
            best = int(score.argmax())
            own[row, :2] = score[best], best + self._own.start
            self._put_likeliest(own[row, 2:], score, top_k)
        gathered = self._gather(logits, own)
        greatest = [_greatest(gathered[:, row]) for row in range(len(draws))]
        token_ids = [token_id for token_id, _ in greatest]
        wide: dict[int, Floats] = {}  # weights of the rows that draw among more than a few
        for row, each in enumerate(draws):
            params = each.params
            if params.temperature == 0.0 or token_ids[row] == NO_TOKEN:
                continue
            if top_ks[row]:
                values, ids = _put_together(gathered[:, row, 2:])
                token_ids[row] = sample_likeliest(values, ids, params, uniform(params.seed, each.position))
            else:
                wide[row] = np.exp((scores[row] - greatest[row][1]) / params.temperature)
        if wide:
            self._draw_wide(logits, wide, draws, token_ids)
        return token_ids

    def _top_k(self, params: SamplingParams) -> int:
        """0: the choice is among the whole vocabulary."""
        return params.top_k if params.temperature != 0.0 and params.top_k < self._vocab_size else 0

    def _draw_wide(
        self, logits: torch.Tensor, wide: dict[int, Floats], draws: Sequence[Draw], token_ids: list[int]
    ) -> None:
        """Puts the tokens of the rows without top-k into `token_ids`."""
        filtered = {row: draws[row].params for row in wide if _filters(draws[row].params)}
        summed = [row for row in wide if row not in filtered or filtered[row].top_p < 1.0]
        sums, masses = self._sums(logits, [(wide[row], row in filtered) for row in summed])
        by_row = {row: (sums[place], masses[place]) for place, row in enumerate(summed)}
        plain = [row for row in wide if row not in filtered]
        places = [find_group(by_row[row][0], uniform(draws[row].params.seed, draws[row].position)) for row in plain]
        insides = self._insides(logits, [wide[row] for row in plain], [group for group, _, _ in places])
        for row, (group, before, target), inside in zip(plain, places, insides, strict=True):
            inside = inside[: self._vocab_size - group * GROUP]
            token_ids[row] = group * GROUP + find_in_group(inside, before, target)
        if not filtered:
            return
        wholes = {row: (float(np.cumsum(by_row[row][0])[-1]), self._vocab_size) for row in filtered if row in by_row}
        passing = []
        for row, params in filtered.items():
            least = params.min_p
            if row in wholes:
                by_mass = _least_by_mass(by_row[row][1], params.top_p * wholes[row][0])
                least = max(least, by_mass, least_nucleus_weight(params.top_p, wholes[row]))
            passing.append(np.flatnonzero(wide[row] >= least))
        found = self._candidates(logits, [wide[row] for row in filtered], passing)
        for (row, params), (weights, ids) in zip(filtered.items(), found, strict=True):
            u = uniform(params.seed, draws[row].position)
            token_ids[row] = sample_weights(weights, ids, params, u, wholes.get(row))

    def _sums(self, logits: torch.Tensor, weights: list[tuple[Floats, bool]]) -> tuple[Floats, Floats]:
        """([rows, groups] sums of the whole vocabulary, [rows, _MASSES] of weights by size, where asked for)"""
        if not weights:
            return np.empty((0, 0)), np.empty((0, 0))
        num_groups, cut = -(-self._vocab_size // GROUP), self._cut_groups
        own = np.zeros((len(weights), num_groups + len(cut) * GROUP + _MASSES))
        whole = self._whole_groups
        for row, (each, with_masses) in zip(own, weights, strict=True):
            if whole:
                first = whole.start * GROUP - self._own.start
                row[whole.start : whole.stop] = group_sums(each[first : whole.stop * GROUP - self._own.start])
            for place, group in enumerate(cut):
                self._put_group(row[num_groups + place * GROUP :][:GROUP], each, group)
            if with_masses:
                row[-_MASSES:] = np.bincount(_sizes(each), each, _MASSES)
        summed = self._sum(logits, own)
        for place, group in enumerate(cut):
            length = min(GROUP, self._vocab_size - group * GROUP)
            inside = summed[:, num_groups + place * GROUP :][:, :length]
            summed[:, group] = [group_sums(each)[0] for each in np.ascontiguousarray(inside)]
        return summed[:, :num_groups], summed[:, -_MASSES:]

    def _insides(self, logits: torch.Tensor, weights: list[Floats], groups: list[int]) -> Floats:
        """[rows, GROUP]: of each row the weights of one group, whichever ranks hold them."""
        if not weights:
            return np.empty((0, GROUP))
        own = np.zeros((len(weights), GROUP))
        for row, each, group in zip(own, weights, groups, strict=True):
            self._put_group(row, each, group)
        return self._sum(logits, own)

    def _put_group(self, into: Floats, weights: Floats, group: int) -> None:
        start, stop = max(group * GROUP, self._own.start), min((group + 1) * GROUP, self._own.stop)
        if start < stop:
            into[start - group * GROUP : stop - group * GROUP] = weights[
                start - self._own.start : stop - self._own.start
            ]

    def _put_likeliest(self, into: Floats, scores: Floats, count: int) -> None:
        """into: [2 · n], filled with -1: values, then token ids; both by rising id."""
        top = np.sort(likeliest(scores, min(count, scores.size)))
        into[: top.size] = scores[top]
        into[into.size // 2 :][: top.size] = top + self._own.start

    def _candidates(
        self, logits: torch.Tensor, weights: list[Floats], passing: list[NDArray[np.int64]]
    ) -> list[tuple[Floats, NDArray[np.int64]]]:
        """For each row weights and token ids of what passes on any rank, by rising id."""
        counts = self._gather(logits, np.array([[each.size for each in passing]], np.float64))[:, 0].astype(int)
        own = np.concatenate(
            [
                np.stack((w[index], index + float(self._own.start)), axis=1)
                for w, index in zip(weights, passing, strict=True)
            ]
        )
        sizes: list[int] = counts.sum(axis=1).tolist()
        parts = self._gathered(logits, own, sizes)
        cut = [np.split(part, np.cumsum(count)[:-1]) for part, count in zip(parts, counts, strict=True)]
        rows = [np.concatenate(pieces) for pieces in zip(*cut, strict=True)]
        return [(np.ascontiguousarray(row[:, 0]), row[:, 1].astype(np.int64)) for row in rows]

    # ---- between the ranks -----------------------------------------------------------------------------------------

    def _gather(self, logits: torch.Tensor, own: Floats) -> Floats:
        """[ranks, *own.shape]"""
        return np.stack(self._gathered(logits, own, [own.shape[0]] * len(self._runs)))

    def _gathered(self, logits: torch.Tensor, own: Floats, sizes: list[int]) -> list[Floats]:
        return [part.cpu().numpy() for part in self._groups.gather(torch.from_numpy(own).to(logits.device), sizes)]

    def _sum(self, logits: torch.Tensor, own: Floats) -> Floats:
        found: Floats = self._groups.sum(torch.from_numpy(own).to(logits.device)).cpu().numpy()
        return found


def _groups_of(runs: list[range], own: range, vocab_size: int) -> tuple[range, list[int]]:
    """(groups of GROUP neighbours that lie whole in `own`, all groups that lie in several runs)"""
    cut = sorted({run.start // GROUP for run in runs if run.start % GROUP})
    first = -(-own.start // GROUP)
    end = -(-own.stop // GROUP) if own.stop == vocab_size else own.stop // GROUP
    whole = [group for group in range(first, end) if group not in cut]
    return (range(whole[0], whole[-1] + 1) if whole else range(0)), cut


def _greatest(parts: Floats) -> tuple[int, float]:
    """parts: [ranks, (greatest score, its token id)]; the lower id of equals; NO_TOKEN where it is not finite."""
    values = parts[:, 0]
    rank = int(values.argmax())  # a NaN counts as the greatest
    return (int(parts[rank, 1]) if math.isfinite(values[rank]) else NO_TOKEN), float(values[rank])


def _put_together(parts: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """parts: [ranks, (values, ids)] as _put_likeliest writes them; both in one row, by rising id."""
    half = parts.shape[1] // 2
    ids = parts[:, half:].ravel()
    real = ids >= 0
    return parts[:, :half].ravel()[real], ids[real].astype(np.int64)


def _filters(params: SamplingParams) -> bool:
    return params.top_p < 1.0 or params.min_p > 0.0


def _sizes(weights: Floats) -> NDArray[np.int64]:
    """Of weights in [0, 1]: 0 for 1, and one more for every quarter of a power of two; from exponent and first bits."""
    found: NDArray[np.int64] = np.clip((1023 << 2) - (weights.view(np.int64) >> 50), 0, _MASSES - 1)
    return found


def _least_by_mass(masses: Floats, wanted: float) -> float:
    """The smallest weight that can be needed for the greatest weights to sum to `wanted`."""
    reached = int(np.searchsorted(np.cumsum(masses), wanted * (1.0 + _ROUNDING)))
    if reached >= _MASSES - 1:
        return 0.0
    lower_edge = np.array([(1023 << 2) - reached], np.int64) << 50
    return float(lower_edge.view(np.float64)[0])
