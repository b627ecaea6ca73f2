"""From logits to tokens. A row's token is a function of its logits and its Draw, and not of the batch around it.

Every token of the vocabulary has a number of its own for each (seed, position), and the row's token is the winner of a
race with these (kernels/sampling.py): so a stream resumed on another worker draws what the first would have drawn, and
what a smaller model would draw at the position is mostly the same.

Order, with x the row's logits (ties always go to the lower token id):

    constraint           x[i] = -inf where the constraint admits no token i (engine/grammar.py)
    logit bias           x[i] += bias[i]
    repetition penalty   for every id in prompt or output: x /= penalty where x > 0, x *= penalty elsewhere
                         (Keskar et al. 2019, arXiv:1909.05858; transformers' RepetitionPenaltyLogitsProcessor)
    frequency, presence  x[i] -= frequency · count[i] + presence · (count[i] > 0), counted over the output (OpenAI)
    temperature          0 takes the greatest x and ends here
    top-k, top-p, min-p  which tokens stay: kernels/sampling.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.sampling import options_of, sample, stream_of
from scheduler.plan import NO_TOKEN, Draw, Drawn, TokenLogprobs

Mask = NDArray[np.bool_]


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
    winners, _ = sample(adjusted(logits, draws, allowed), *race_inputs(draws, logits.device))
    return [
        Drawn(token_id) if token_id == NO_TOKEN else _drawn(logits[row], each, forced(each, token_id))
        for row, (each, token_id) in enumerate(zip(draws, winners.tolist(), strict=True))
    ]


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


def _drawn(logits: torch.Tensor, each: Draw, token_id: int) -> Drawn:
    if each.params.logprobs is None:
        return Drawn(token_id)
    return Drawn(token_id, token_logprobs(logits.cpu().numpy(), token_id, each.params.logprobs))


def race_inputs(draws: Sequence[Draw], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(options, streams) as kernels.sampling.sample takes them."""
    options = [
        options_of(each.params.temperature, each.params.top_k, each.params.top_p, each.params.min_p) for each in draws
    ]
    streams = [stream_of(each.params.seed, each.position) for each in draws]
    return torch.tensor(options, dtype=torch.float64).to(device), torch.tensor(streams).to(device)


def adjusted(
    logits: torch.Tensor, draws: Sequence[Draw], allowed: Sequence[Mask | None] | None = None, first_id: int = 0
) -> torch.Tensor:
    """[R, V] float32: constraint, bias and penalties applied to tokens [first_id, first_id + V), each number in float64
    and rounded once. `logits` stays."""
    masks = allowed or [None] * len(draws)
    changed = [
        row
        for row, (each, mask) in enumerate(zip(draws, masks, strict=True))
        if mask is not None or each.params.logit_bias or each.params.has_penalties
    ]
    if not changed:
        return logits
    # On a CPU by NumPy: torch would wake its threads, and wait for them where the cores are taken.
    scores = torch.from_numpy(logits.numpy().copy()) if logits.is_cpu else logits.clone()
    for row in changed:
        mask = masks[row]
        if mask is not None:
            greatest = scores.numpy()[row].max() if scores.is_cpu else scores[row].max()
            if not math.isfinite(float(greatest)):
                continue  # the row draws NO_TOKEN, and a mask must not hide why
            if scores.is_cpu:
                scores.numpy()[row, ~mask] = -math.inf
            else:
                scores[row].masked_fill_(torch.from_numpy(~mask).to(scores.device), -math.inf)
        _adjust(scores[row], draws[row], first_id)
    return scores


def _adjust(scores: torch.Tensor, each: Draw, first_id: int) -> None:
    """scores: [V], changed in place; only those of tokens that the bias or the history names."""
    params = each.params
    history = np.asarray(each.history if params.has_penalties else (), np.int64) - first_id
    biased = np.fromiter(params.logit_bias, np.int64, len(params.logit_bias)) - first_id
    named = np.concatenate((biased, history))
    inside = (named >= 0) & (named < scores.shape[0])
    ids, order = np.unique(named[inside], return_inverse=True)
    if not ids.size:
        return
    index = np.full(named.size, ids.size)  # of each in `ids`; one more for those of other ranks
    index[inside] = order
    values = np.append(_picked(scores, ids), 0.0)
    values[index[: biased.size]] += np.fromiter(params.logit_bias.values(), np.float64, biased.size)
    if params.repetition_penalty != 1.0:
        seen = np.unique(index[biased.size :])
        kept = values[seen]
        values[seen] = np.where(kept > 0, kept / params.repetition_penalty, kept * params.repetition_penalty)
    counts = np.bincount(index[biased.size + each.prompt_tokens :], minlength=values.size)
    values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    _put(scores, ids, values[:-1])


def _picked(scores: torch.Tensor, ids: NDArray[np.int64]) -> NDArray[np.float64]:
    if scores.is_cpu:
        return scores.numpy()[ids].astype(np.float64)
    return scores[torch.from_numpy(ids).to(scores.device)].double().cpu().numpy()


def _put(scores: torch.Tensor, ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    if scores.is_cpu:
        scores.numpy()[ids] = values
    else:
        scores[torch.from_numpy(ids).to(scores.device)] = torch.from_numpy(values).float().to(scores.device)


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
