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

from kernels.cpu.library import library_for

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
    run = reference if library is None else library.moe_route
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
