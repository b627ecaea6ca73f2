"""From logits to tokens. A row's token is a function of its logits and its Draw, and not of the batch around it.

One uniform number per (seed, position) goes through the inverse of the row's cumulative distribution in token-id order,
in float64, so that a stream resumed on another worker draws what the first would have drawn.

Order, with x the row's logits (ties always go to the lower token id):

    logit bias           x[i] += bias[i]
    repetition penalty   for every id in prompt or output: x /= penalty where x > 0, x *= penalty elsewhere
                         (Keskar et al. 2019, arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor)
    frequency, presence  x[i] -= frequency · count[i] + presence · (count[i] > 0), counted over the output (OpenAI)
    temperature          x /= temperature; 0 takes the greatest x and ends here
    top-k                the k likeliest stay
    top-p                the fewest likeliest whose probability reaches p stay (Holtzman et al. 2020, arXiv:1904.09751);
                         probabilities are taken after top-k
    min-p                those with at least min_p times the probability of the likeliest stay (arXiv:2407.01082)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.philox import uniform
from scheduler.plan import NO_TOKEN, Draw, Drawn, TokenLogprobs
from spec.sampling import SamplingParams

Floats = NDArray[np.float64]
_GROUP = 256  # tokens summed as one when the cumulative distribution is searched


def draw(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """logits: [len(draws), vocab] float32, on any device. A row without a finite maximum draws NO_TOKEN.

    A step in which every sequence is greedy and asks for nothing more costs one argmax, on the logits' device.
    """
    if not draws:
        return []
    if not any(_needs_row(each) for each in draws):
        return [
            Drawn(token_id if token_id == NO_TOKEN else _forced(each, token_id))
            for each, token_id in zip(draws, _argmax(logits), strict=True)
        ]
    rows = logits.cpu().numpy()
    return [_draw_row(row, each) for row, each in zip(rows, draws, strict=True)]


def token_logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """logits: [vocab], the model's own. Natural logarithm of softmax in float64; num_top up to the whole vocabulary."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - math.log(np.exp(wide).sum())
    top = _likeliest(logits, num_top)
    return TokenLogprobs(
        float(logprobs[token_id]), tuple(zip(top.tolist(), logprobs[top].tolist(), strict=True)) if num_top else ()
    )


def _needs_row(each: Draw) -> bool:
    params = each.params
    return bool(params.temperature != 0.0 or params.logprobs is not None or params.has_penalties or params.logit_bias)


def _argmax(logits: torch.Tensor) -> list[int]:
    if logits.device.type == "cpu":  # ten times faster than torch here
        rows = logits.numpy()
        token_ids = rows.argmax(axis=1)
        best = rows[np.arange(token_ids.size), token_ids]
    else:
        values, indices = logits.max(dim=1)
        token_ids, best = indices.cpu().numpy(), values.cpu().numpy()
    found: list[int] = np.where(np.isfinite(best), token_ids, NO_TOKEN).tolist()
    return found


def _forced(each: Draw, token_id: int) -> int:
    index, forced = each.position - each.prompt_tokens, each.params.forced_token_ids
    assert index >= 0
    return forced[index] if index < len(forced) else token_id


def _draw_row(logits: NDArray[np.float32], each: Draw) -> Drawn:
    params = each.params
    scores = _penalized(logits, each)
    best = int(scores.argmax())
    if not math.isfinite(scores[best]):
        return Drawn(NO_TOKEN)
    token_id = best if params.temperature == 0.0 else _sample(scores, params, uniform(params.seed, each.position))
    token_id = _forced(each, token_id)
    logprobs = None if params.logprobs is None else token_logprobs(logits, token_id, params.logprobs)
    return Drawn(token_id, logprobs)


def _penalized(logits: NDArray[np.float32], each: Draw) -> Floats:
    """[vocab] float64: bias and penalties applied. `logits` stays as it is."""
    params, scores = each.params, logits.astype(np.float64)
    if params.logit_bias:
        scores[np.fromiter(params.logit_bias.keys(), np.int64)] += np.fromiter(params.logit_bias.values(), np.float64)
    if not params.has_penalties:
        return scores
    history = np.asarray(each.history, np.int64)
    if params.repetition_penalty != 1.0:
        seen = np.unique(history)
        values = scores[seen]
        scores[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if len(history) > each.prompt_tokens:
        ids, counts = np.unique(history[each.prompt_tokens :], return_counts=True)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return scores


def _sample(scores: Floats, params: SamplingParams, u: float) -> int:
    """The token at which the cumulative distribution of what the filters leave first exceeds u."""
    ids: NDArray[np.int64] | None = None  # None: all tokens
    if 0 < params.top_k < scores.size:
        ids = np.sort(_likeliest(scores, params.top_k))
        scores = scores[ids]
    weights = np.exp((scores - scores.max()) / params.temperature)
    kept = _kept(weights, params)
    if kept is not None:
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    index = _inverse_cumulative(weights, u)
    return index if ids is None else int(ids[index])


def _kept(weights: Floats, params: SamplingParams) -> NDArray[np.int64] | None:
    """Indices, rising, that top-p and min-p leave of [n] weights whose greatest is 1; None when neither is asked."""
    if params.top_p >= 1.0 and params.min_p <= 0.0:
        return None
    kept = np.arange(weights.size) if params.top_p >= 1.0 else _nucleus(weights, params.top_p)
    return kept[weights[kept] >= params.min_p]


def _nucleus(weights: Floats, top_p: float) -> NDArray[np.int64]:
    """Indices, rising, of the fewest greatest weights whose sum reaches top_p of all; ties go to the lower index.

    Weights below (1 - top_p) / n of the sum cannot be among them, all of those together being less than 1 - top_p; so
    only the others are sorted.
    """
    total = weights.sum()
    candidates = np.flatnonzero(weights >= total * (1.0 - top_p) / weights.size)
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    reached = int(np.searchsorted(np.cumsum(weights[order]), top_p * total)) + 1
    return np.sort(order[:reached])


def _likeliest(scores: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The `count` greatest, likeliest first; ties go to the lower id, in the choice as in the order."""
    if count == 0:
        return np.empty(0, np.int64)
    if count < scores.size:
        smallest = np.partition(scores, scores.size - count)[scores.size - count]
        above = np.flatnonzero(scores > smallest)
        ids = np.concatenate((above, np.flatnonzero(scores == smallest)[: count - above.size]))
        ids.sort()
    else:
        ids = np.arange(scores.size)
    return ids[np.argsort(-scores[ids], kind="stable")]


def _inverse_cumulative(weights: Floats, u: float) -> int:
    """The first index whose cumulative weight exceeds u · sum, for u in [0, 1). Summed by groups first, then in one."""
    starts = np.arange(0, weights.size, _GROUP)
    cumulative = np.cumsum(np.add.reduceat(weights, starts))
    target = u * cumulative[-1]
    group = min(int(np.searchsorted(cumulative, target, side="right")), starts.size - 1)
    before = cumulative[group - 1] if group else 0.0
    inside = np.cumsum(weights[starts[group] : starts[group] + _GROUP]) + before
    index = int(np.searchsorted(inside, target, side="right"))
    if index == inside.size:  # the two sums round differently: the group's last token that can be drawn at all
        index = int(np.flatnonzero(weights[starts[group] : starts[group] + _GROUP])[-1])
    return int(starts[group]) + index
