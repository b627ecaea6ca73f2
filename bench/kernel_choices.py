"""Cases of what chooses: tokens of rows of scores, and experts of a mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.kernel_case import Case, Goal, Peer, Run, Setting, Work, share_that_differs
from kernels import moe_route, sampling


def tokens(setting: Setting, *, rows: int, vocab: int, temperature: float, top_k: int, top_p: float) -> Work:
    """One read of the scores is the least that any choice takes."""
    scores = torch.randn(rows, vocab, device=setting.device) * 3
    options = torch.tensor([sampling.options_of(temperature, top_k, top_p, 0.0)] * rows, dtype=torch.float64)
    options = options.to(setting.device)
    streams = torch.tensor([sampling.stream_of(7, row) for row in range(rows)], device=setting.device)

    def greedy() -> Run:
        return lambda: scores.argmax(dim=1)

    def drawn() -> Run:
        return lambda: torch.multinomial((scores / temperature).softmax(-1), 1)

    def filtered() -> Tensor:
        ordered, order = (scores / temperature).topk(top_k, dim=1)
        shares = ordered.softmax(-1)
        shares = shares.masked_fill(shares.cumsum(1) - shares > top_p, 0.0)
        return order.gather(1, torch.multinomial(shares, 1))

    def flashinfer() -> Run:
        from flashinfer import sampling as theirs

        if top_k:
            return lambda: theirs.top_k_top_p_sampling_from_logits(scores / temperature, top_k, top_p)
        return lambda: theirs.sampling_from_logits(scores / temperature)

    peers = {"softmax, multinomial": Peer(drawn, None), "FlashInfer": Peer(flashinfer, None)}
    if temperature == 0:
        peers = {"argmax": Peer(greedy, 0.0)}
    elif top_k:
        peers = {"topk, softmax, multinomial": Peer(lambda: filtered, None), "FlashInfer": Peer(flashinfer, None)}
    return Work(
        lambda: sampling.launch(scores, options, streams)[0],
        lambda: sampling.reference(scores, options, streams)[0],
        peers,
        scores.nbytes,
        difference=share_that_differs,
    )


def experts(setting: Setting, *, tokens: int, num_experts: int, per_token: int) -> Work:
    logits = torch.randn(tokens, num_experts, device=setting.device)

    def in_torch() -> tuple[Tensor, Tensor]:
        weights, expert_ids = logits.softmax(-1).topk(per_token, dim=-1)
        return expert_ids, weights / weights.sum(-1, keepdim=True)

    return Work(
        lambda: moe_route.launch(logits, experts_per_token=per_token, scoring="softmax", normalise=True),
        lambda: moe_route.reference(logits, experts_per_token=per_token, scoring="softmax", normalise=True),
        {"softmax, topk": Peer(lambda: in_torch), "torch.compile": Peer(lambda: setting.compiled(in_torch))},
        logits.nbytes + tokens * per_token * 12,
    )


def _tokens(name: str, goal: float, **options: float) -> Case:
    return Case(
        name,
        "sampling",
        tokens,
        {"rows": 2, "vocab": 67, **options},
        {"rows": 61, "vocab": 32003, **options},
        {"rows": 256, "vocab": 128256, **options},
        goal=Goal("share", goal),
        # A token at the edge of top-p may be in for masses in fp32 and out for others.
        tolerance=0.05,
    )


CASES = (
    _tokens("greatest score, 256 x 128256", 0.7, temperature=0.0, top_k=0, top_p=1.0),
    _tokens("draw, no filter, 256 x 128256", 0.6, temperature=0.8, top_k=0, top_p=1.0),
    _tokens("draw, top-k 50, top-p 0.9, 256 x 128256", 0.1, temperature=0.8, top_k=50, top_p=0.9),
    Case(
        "routing, 8192 tokens to 8 of 128",
        "moe_route",
        experts,
        {"tokens": 5, "num_experts": 6, "per_token": 2},
        {"tokens": 61, "num_experts": 128, "per_token": 8},
        {"tokens": 8192, "num_experts": 128, "per_token": 8},
    ),
)
