"""Which experts of a mixture a token goes to, and with what weight (Shazeer et al. 2017, arXiv:1701.06538).

    scores  = softmax(logits)      "softmax": Mixtral (arXiv:2401.04088), Qwen3-MoE, DeepSeek-V2 (arXiv:2405.04434)
            = sigmoid(logits)      "sigmoid": DeepSeek-V3 (arXiv:2412.19437)
            = logits               "softmax_chosen": gpt-oss (arXiv:2508.10925)
    chosen  = the experts_per_token experts of the greatest scores + bias, the greatest first
    weights = softmax(scores[chosen])                              where scoring is "softmax_chosen"
            = scores[chosen] / (Σ scores[chosen] + 1e-20)          where they are normalised
            = scores[chosen]                                       otherwise; all times `scale`

With groups the experts lie in num_groups equal groups, one after the other, and only those of the groups_per_token best
can be chosen. A group is as good as its greatest score + bias ("max": DeepSeek-V2) or the sum of its two greatest
("top2": DeepSeek-V3). Equal experts, and equal groups, go by the lower index. All is computed in fp32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kernels import tuning
from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton

Scoring = Literal["softmax", "softmax_chosen", "sigmoid"]
GroupScore = Literal["max", "top2"]

NORMALISE_EPS = 1e-20


def reference(
    logits: Tensor,
    *,
    experts_per_token: int,
    scoring: Scoring,
    normalise: bool,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score: GroupScore = "max",
) -> tuple[Tensor, Tensor]:
    scores = logits
    if scoring == "softmax":
        scores = logits.softmax(dim=-1)
    elif scoring == "sigmoid":
        scores = logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if groups_per_token < num_groups:
        num_tokens, num_experts = choice.shape
        grouped = choice.view(num_tokens, num_groups, num_experts // num_groups)
        group_scores = grouped.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)
        shut = torch.ones_like(group_scores, dtype=torch.bool)
        shut.scatter_(1, _greatest(group_scores, groups_per_token), False)
        choice = grouped.masked_fill(shut[..., None], float("-inf")).flatten(1)
    expert_ids = _greatest(choice, experts_per_token)
    weights = scores.gather(1, expert_ids)
    if scoring == "softmax_chosen":
        weights = weights.softmax(dim=-1)
    elif normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + NORMALISE_EPS)
    return expert_ids, weights * scale


def _greatest(scores: Tensor, count: int) -> Tensor:
    """[T, N] -> [T, count], indices of the greatest, the greatest first, equal ones by index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


@jit
def _open_groups(
    keys,
    expert,
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PER_TOKEN: tl.constexpr,
    TOP2: tl.constexpr,
):
    """Whether an expert may be chosen, by expert; its key and the sum of two are above -inf."""
    group = tl.arange(0, GROUPS_PADDED)
    worth = tl.full((GROUPS_PADDED,), float("-inf"), tl.float32)
    for g in tl.static_range(NUM_GROUPS):
        own = tl.where(expert // GROUP_SIZE == g, keys, float("-inf"))
        best = tl.max(own, 0)
        if TOP2:
            best += tl.max(tl.where(expert == tl.argmax(own, 0), float("-inf"), own), 0)
        worth = tl.where(group == g, best, worth)
    may = expert < 0
    for _ in tl.static_range(GROUPS_PER_TOKEN):
        chosen = tl.argmax(worth, 0)
        may |= expert // GROUP_SIZE == chosen
        worth = tl.where(group == chosen, float("-inf"), worth)
    return may


@jit
def _kernel(
    logits_ptr,  # [T, E] fp32, contiguous
    bias_ptr,  # [E] fp32, where HAS_BIAS
    expert_ids_ptr,  # [T, EXPERTS_PER_TOKEN] int64, contiguous, written
    weights_ptr,  # [T, EXPERTS_PER_TOKEN] fp32, contiguous, written
    scale,
    HAS_BIAS: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,  # power of two, at least NUM_EXPERTS
    EXPERTS_PER_TOKEN: tl.constexpr,
    CHOSEN_PADDED: tl.constexpr,  # power of two, at least EXPERTS_PER_TOKEN
    NUM_GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,  # power of two, at least NUM_GROUPS
    GROUPS_PER_TOKEN: tl.constexpr,
    TOP2: tl.constexpr,
):
    """One program per token. Of equal values tl.argmax takes the first."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_PADDED)
    real = expert < NUM_EXPERTS
    scores = tl.load(logits_ptr + token * NUM_EXPERTS + expert, real, other=float("-inf"))
    if SCORING == "softmax":
        powers = tl.exp(scores - tl.max(scores, 0))
        scores = powers / tl.sum(powers, 0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-scores))
    keys = scores
    if HAS_BIAS:
        keys += tl.load(bias_ptr + expert, real, other=0.0)
    # What may not be chosen is below all that may, and a NaN above: it is chosen, and so is seen.
    keys = tl.where(keys != keys, float("inf"), tl.maximum(keys, -1e38))
    keys = tl.where(real, keys, float("-inf"))
    if GROUPS_PER_TOKEN < NUM_GROUPS:
        may = _open_groups(keys, expert, NUM_GROUPS, GROUPS_PADDED, NUM_EXPERTS // NUM_GROUPS, GROUPS_PER_TOKEN, TOP2)
        keys = tl.where(may, keys, float("-inf"))

    place = tl.arange(0, CHOSEN_PADDED)
    expert_ids = tl.zeros((CHOSEN_PADDED,), tl.int64)
    weights = tl.full((CHOSEN_PADDED,), float("-inf") if SCORING == "softmax_chosen" else 0.0, tl.float32)
    for j in tl.static_range(EXPERTS_PER_TOKEN):
        chosen = tl.argmax(keys, 0)
        expert_ids = tl.where(place == j, chosen, expert_ids)
        weights = tl.where(place == j, tl.sum(tl.where(expert == chosen, scores, 0.0), 0), weights)
        keys = tl.where(expert == chosen, float("-inf"), keys)
    if SCORING == "softmax_chosen":
        powers = tl.exp(weights - tl.max(weights, 0))
        weights = powers / tl.sum(powers, 0)
    elif NORMALISE:
        weights /= tl.sum(weights, 0) + EPS
    out = token * EXPERTS_PER_TOKEN + place
    tl.store(expert_ids_ptr + out, expert_ids, place < EXPERTS_PER_TOKEN)
    tl.store(weights_ptr + out, weights * scale, place < EXPERTS_PER_TOKEN)


def launch(
    logits: Tensor,
    *,
    experts_per_token: int,
    scoring: Scoring,
    normalise: bool,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score: GroupScore = "max",
) -> tuple[Tensor, Tensor]:
    num_tokens, num_experts = logits.shape
    expert_ids = logits.new_empty(num_tokens, experts_per_token, dtype=torch.int64)
    weights = logits.new_empty(num_tokens, experts_per_token)
    if num_tokens == 0:
        return expert_ids, weights
    _kernel[(num_tokens,)](
        logits.contiguous(),
        None if bias is None else bias.contiguous(),
        expert_ids,
        weights,
        scale,
        bias is not None,
        scoring,
        normalise,
        NORMALISE_EPS,
        num_experts,
        triton.next_power_of_2(num_experts),
        experts_per_token,
        triton.next_power_of_2(experts_per_token),
        num_groups,
        triton.next_power_of_2(num_groups),
        groups_per_token,
        group_score == "top2",
        **tuning.choose("moe_route", logits.device, num_experts=num_experts).options,
    )
    return expert_ids, weights


def moe_route(
    logits: Tensor,
    *,
    experts_per_token: int,
    scoring: Scoring,
    normalise: bool,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score: GroupScore = "max",
) -> tuple[Tensor, Tensor]:
    """logits: [T, E] float32; bias: [E] float32, counted in the choice and not in the weight. Returns (expert_ids
    [T, experts_per_token] int64, weights [T, experts_per_token] float32)."""
    num_experts = logits.shape[1]
    assert logits.dtype == torch.float32
    assert bias is None or (bias.shape == (num_experts,) and bias.dtype == torch.float32)
    assert num_experts % num_groups == 0
    assert 1 <= groups_per_token <= num_groups
    group_size = num_experts // num_groups
    assert 1 <= experts_per_token <= groups_per_token * group_size
    assert group_score == "max" or group_size >= 2
    library = library_for(logits)
    run = launch if logits.is_cuda else reference if library is None else library.moe_route
    return run(
        logits,
        experts_per_token=experts_per_token,
        scoring=scoring,
        normalise=normalise,
        scale=scale,
        bias=bias,
        num_groups=num_groups,
        groups_per_token=groups_per_token,
        group_score=group_score,
    )
