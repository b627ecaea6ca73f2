"""From logits to tokens. A row's token is a function of its logits and its Draw, and not of the batch around it.

One uniform number per (seed, position) goes through the inverse of the row's cumulative distribution in token-id order,
in float64, so that a stream resumed on another worker draws what the first would have drawn.

Order, with x the row's logits (ties always go to the lower token id):

    constraint           x[i] = -inf where the constraint admits no token i (engine/grammar.py)
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
Mask = NDArray[np.bool_]
GROUP = 256  # tokens summed as one when the cumulative distribution is searched


def draw(
    logits: torch.Tensor,
    draws: Sequence[Draw],
    allowed: Sequence[Mask | None] | None = None,
    best: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[Drawn]:
    """logits: [len(draws), vocab] float32, on any device. A row without a finite maximum draws NO_TOKEN. allowed: of
    each row with a constraint [vocab], the tokens that it admits. best: index and value of each row's greatest logit,
    where they are known.

    A step in which every sequence is greedy and asks for nothing more costs one argmax, on the logits' device.
    """
    if not draws:
        return []
    if not any(needs_row(each) for each in draws):
        token_ids, values = argmax(logits) if best is None else (best[0].cpu().numpy(), best[1].cpu().numpy())
        found: list[int] = np.where(np.isfinite(values), token_ids, NO_TOKEN).tolist()
        return [
            Drawn(token_id if token_id == NO_TOKEN else forced(each, token_id))
            for each, token_id in zip(draws, found, strict=True)
        ]
    rows = logits.cpu().numpy()
    masks = allowed or [None] * len(draws)
    return [_draw_row(row, each, mask) for row, each, mask in zip(rows, draws, masks, strict=True)]


def token_logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """logits: [vocab], the model's own. Natural logarithm of softmax in float64; num_top up to the whole vocabulary."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - math.log(np.exp(wide).sum())
    top = likeliest(logits, num_top)
    return TokenLogprobs(
        float(logprobs[token_id]), tuple(zip(top.tolist(), logprobs[top].tolist(), strict=True)) if num_top else ()
    )


def needs_row(each: Draw) -> bool:
    """Whether the greatest logit alone does not tell."""
    params = each.params
    return bool(params.temperature != 0.0 or params.logprobs is not None or params.needs_history or params.logit_bias)


def argmax(logits: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """logits: [W, V]. (index, value) of each row's greatest, the first of equal ones; of a NaN where there is one."""
    if logits.device.type == "cpu":  # ten times faster than torch here
        rows = logits.numpy()
        indices = rows.argmax(axis=1)
        return indices, rows[np.arange(indices.size), indices]
    values, places = logits.max(dim=1)
    return places.cpu().numpy(), values.cpu().numpy()


def forced(each: Draw, token_id: int) -> int:
    """`token_id`, or what teacher forcing puts in its place."""
    index, given = each.position - each.prompt_tokens, each.params.forced_token_ids
    assert index >= 0
    return given[index] if index < len(given) else token_id


def _draw_row(logits: NDArray[np.float32], each: Draw, allowed: Mask | None) -> Drawn:
    params = each.params
    scores = penalized(logits, each, allowed)
    best = int(scores.argmax())
    if not math.isfinite(scores[best]):
        return Drawn(NO_TOKEN)
    token_id = best if params.temperature == 0.0 else _sample(scores, params, uniform(params.seed, each.position))
    token_id = forced(each, token_id)
    logprobs = None if params.logprobs is None else token_logprobs(logits, token_id, params.logprobs)
    return Drawn(token_id, logprobs)


def penalized(logits: NDArray[np.float32], each: Draw, allowed: Mask | None, first_id: int = 0) -> Floats:
    """[V] float64: constraint, bias and penalties applied to tokens [first_id, first_id + V). `logits` stays."""
    params, scores = each.params, logits.astype(np.float64)
    if allowed is not None:
        scores[~allowed] = -np.inf
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), np.int64) - first_id
        here = (ids >= 0) & (ids < scores.size)
        scores[ids[here]] += np.fromiter(params.logit_bias.values(), np.float64)[here]
    if not params.has_penalties:
        return scores
    history = np.asarray(each.history, np.int64) - first_id
    here = (history >= 0) & (history < scores.size)
    if params.repetition_penalty != 1.0:
        seen = np.unique(history[here])
        values = scores[seen]
        scores[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    output = history[each.prompt_tokens :][here[each.prompt_tokens :]]
    if output.size:
        ids, counts = np.unique(output, return_counts=True)
        scores[ids] -= params.frequency_penalty * counts + params.presence_penalty
    return scores


def _sample(scores: Floats, params: SamplingParams, u: float) -> int:
    """The token at which the cumulative distribution of what the filters leave first exceeds u."""
    if 0 < params.top_k < scores.size:
        return sample_likeliest(scores, None, params, u)
    weights = np.exp((scores - scores.max()) / params.temperature)
    return sample_weights(weights, None, params, u)


def sample_likeliest(scores: Floats, ids: NDArray[np.int64] | None, params: SamplingParams, u: float) -> int:
    """Of the top_k of [n] scores with token ids `ids`, rising (None: 0 to n - 1)."""
    chosen = np.sort(likeliest(scores, params.top_k))
    weights = np.exp((scores[chosen] - scores[chosen].max()) / params.temperature)
    return sample_weights(weights, chosen if ids is None else ids[chosen], params, u)


def sample_weights(
    weights: Floats,
    ids: NDArray[np.int64] | None,
    params: SamplingParams,
    u: float,
    whole: tuple[float, int] | None = None,
) -> int:
    """Of [n] weights whose greatest is 1, by top-p, min-p and u; `ids` as above. `whole`: sum and number of all
    weights, where these are only such as can pass the filters."""
    kept = _kept(weights, params, whole)
    if kept is not None:
        weights, ids = weights[kept], kept if ids is None else ids[kept]
    index = _inverse_cumulative(weights, u)
    return index if ids is None else int(ids[index])


def _kept(weights: Floats, params: SamplingParams, whole: tuple[float, int] | None) -> NDArray[np.int64] | None:
    """Indices, rising, that top-p and min-p leave of [n] weights; None when neither is asked."""
    if params.top_p >= 1.0 and params.min_p <= 0.0:
        return None
    if params.top_p >= 1.0:
        kept = np.arange(weights.size)
    else:
        kept = _nucleus(weights, params.top_p, whole or (float(np.cumsum(group_sums(weights))[-1]), weights.size))
    return kept[weights[kept] >= params.min_p]


def least_nucleus_weight(top_p: float, whole: tuple[float, int]) -> float:
    """Of n weights those below (1 - top_p) / n of their sum are not in the nucleus: all of them together are less than
    1 - top_p of it."""
    total, size = whole
    return total * (1.0 - top_p) / size


def _nucleus(weights: Floats, top_p: float, whole: tuple[float, int]) -> NDArray[np.int64]:
    """Indices, rising, of the fewest greatest weights whose sum reaches top_p of all; ties go to the lower index."""
    candidates = np.flatnonzero(weights >= least_nucleus_weight(top_p, whole))
    order = candidates[np.argsort(-weights[candidates], kind="stable")]
    reached = int(np.searchsorted(np.cumsum(weights[order]), top_p * whole[0])) + 1
    return np.sort(order[:reached])


def likeliest(scores: NDArray[np.floating], count: int) -> NDArray[np.int64]:
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


def group_sums(weights: Floats) -> Floats:
    """Of GROUP neighbours each, the last of what is left."""
    return np.add.reduceat(weights, np.arange(0, weights.size, GROUP))


def find_group(sums: Floats, u: float) -> tuple[int, float, float]:
    """In which of [groups] the cumulative weight first exceeds u · sum, for u in [0, 1): (group, the cumulative weight
    before it, u · sum)."""
    cumulative = np.cumsum(sums)
    target = u * cumulative[-1]
    group = min(int(np.searchsorted(cumulative, target, side="right")), sums.size - 1)
    return group, float(cumulative[group - 1]) if group else 0.0, float(target)


def find_in_group(weights: Floats, before: float, target: float) -> int:
    """weights: [GROUP or less] of the group that find_group named. The index at which the target is exceeded."""
    index = int(np.searchsorted(np.cumsum(weights) + before, target, side="right"))
    if index == weights.size:  # the two sums round differently: the group's last token that can be drawn at all
        index = int(np.flatnonzero(weights)[-1])
    return index


def _inverse_cumulative(weights: Floats, u: float) -> int:
    """The first index whose cumulative weight exceeds u · sum. Summed by groups first, then in one."""
    group, before, target = find_group(group_sums(weights), u)
    return group * GROUP + find_in_group(weights[group * GROUP : (group + 1) * GROUP], before, target)
