"""The choice of experts against NumPy in float64 and against the routers of transformers, equal scores and NaNs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from kernels.cpu import library as library_module
from kernels.cpu.library import Library
from kernels.moe_route import moe_route, reference

Route = Callable[..., tuple[Tensor, Tensor]]

PLAIN = {"scale": 1.0, "bias": None, "num_groups": 1, "groups_per_token": 1, "group_score": "max"}


@pytest.fixture(params=["reference", "library"])
def run(request: pytest.FixtureRequest, library: Library) -> Route:
    chosen: Route = reference if request.param == "reference" else library.moe_route
    return lambda logits, **options: chosen(logits, **{**PLAIN, **options})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def expected_row(logits: np.ndarray, options: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    kind, count = options["scoring"], options["experts_per_token"]
    scores = {"softmax": softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softmax_chosen": lambda x: x}[kind](
        logits
    )
    choice = scores if options["bias"] is None else scores + options["bias"].double().numpy()
    size = len(logits) // options["num_groups"]
    terms = 1 if options["group_score"] == "max" else 2
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-terms:]) for g in range(options["num_groups"])]
    groups = sorted(range(len(worth)), key=lambda g: (-worth[g], g))[: options["groups_per_token"]]
    candidates = [e for e in range(len(logits)) if e // size in groups]
    chosen = sorted(candidates, key=lambda e: (-choice[e], e))[:count]
    weights = scores[chosen]
    if kind == "softmax_chosen":
        weights = softmax(weights)
    elif options["normalise"]:
        weights = weights / weights.sum()
    return chosen, weights * options["scale"]


CASES = {
    "one expert": (1, 1, {"scoring": "softmax", "normalise": True}),
    "mixtral": (8, 2, {"scoring": "softmax", "normalise": True}),
    "qwen3": (128, 8, {"scoring": "softmax", "normalise": False}),
    "gpt-oss": (33, 4, {"scoring": "softmax_chosen", "normalise": False}),
    "all of them": (5, 5, {"scoring": "sigmoid", "normalise": True}),
    "v2": (
        160,
        6,
        {"scoring": "softmax", "normalise": False, "scale": 16.0, "num_groups": 8, "groups_per_token": 3},
    ),
    "v3": (
        256,
        8,
        {
            "scoring": "sigmoid",
            "normalise": True,
            "scale": 2.5,
            "bias": drawn(256, seed=1),
            "num_groups": 8,
            "groups_per_token": 4,
            "group_score": "top2",
        },
    ),
    "a group's all": (
        15,
        6,
        {
            "scoring": "softmax_chosen",
            "normalise": True,
            "bias": drawn(15, seed=2),
            "num_groups": 5,
            "groups_per_token": 2,
        },
    ),
}


@pytest.mark.parametrize("num_tokens", [1, 6, 123])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.usefixtures("one_thread")
def test_agrees_with_float64(run: Route, case: str, num_tokens: int) -> None:
    num_experts, count, given = CASES[case]
    options = {**PLAIN, **given, "experts_per_token": count}
    logits = 3 * drawn(num_tokens, num_experts)
    expert_ids, weights = run(logits, **options)
    assert (expert_ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    for row in range(num_tokens):
        chosen, expected = expected_row(logits[row].double().numpy(), options)
        assert expert_ids[row].tolist() == chosen
        np.testing.assert_allclose(weights[row].double().numpy(), expected, rtol=3e-6)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.usefixtures("guarded", "one_thread")
def test_writes_all_of_its_outputs_and_nothing_beside_them(library: Library, case: str) -> None:
    num_experts, count, options = CASES[case]
    expert_ids, _ = library.moe_route(drawn(7, num_experts), **{**PLAIN, **options, "experts_per_token": count})
    assert ((expert_ids >= 0) & (expert_ids < num_experts)).all()


def dense(num_experts: int, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: some routers leave the order of the chosen open."""
    return torch.zeros(len(weights), num_experts).scatter_(1, expert_ids, weights.float())


def mixtral() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = MixtralConfig(hidden_size=24, num_local_experts=8, num_experts_per_tok=2)
    return MixtralTopKRouter(config), {"experts_per_token": 2, "scoring": "softmax", "normalise": True}


def qwen3_moe(normalise: bool) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = Qwen3MoeConfig(hidden_size=24, num_experts=60, num_experts_per_tok=4, norm_topk_prob=normalise)
    return Qwen3MoeTopKRouter(config), {"experts_per_token": 4, "scoring": "softmax", "normalise": normalise}


def gpt_oss() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = GptOssConfig(hidden_size=24, num_local_experts=32, num_experts_per_tok=4)
    return GptOssTopKRouter(config), {"experts_per_token": 4, "scoring": "softmax_chosen", "normalise": False}


def deepseek_v2(method: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    config = DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=40,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        topk_method=method,
        routed_scaling_factor=16.0,
    )
    options = {"experts_per_token": 6, "scoring": "softmax", "normalise": False, "scale": 16.0}
    if method == "group_limited_greedy":
        options |= {"num_groups": 8, "groups_per_token": 3, "group_score": "max"}
    return DeepseekV2TopkRouter(config), options


def deepseek_v3() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = DeepseekV3Config(
        hidden_size=24,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    router.e_score_correction_bias.copy_(0.2 * drawn(64, seed=3))
    return router, {
        "experts_per_token": 8,
        "scoring": "sigmoid",
        "normalise": True,
        "scale": 2.5,
        "bias": router.e_score_correction_bias,
        "num_groups": 8,
        "groups_per_token": 4,
        "group_score": "top2",
    }


ROUTERS: dict[str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]] = {
    "Mixtral": mixtral,
    "Qwen3-MoE, normalised": lambda: qwen3_moe(True),
    "Qwen3-MoE": lambda: qwen3_moe(False),
    "gpt-oss": gpt_oss,
    "DeepSeek-V2-Lite": lambda: deepseek_v2("greedy"),
    "DeepSeek-V2": lambda: deepseek_v2("group_limited_greedy"),
    "DeepSeek-V3": deepseek_v3,
}


@pytest.mark.parametrize("family", list(ROUTERS))
@torch.no_grad()
def test_agrees_with_the_routers_of_transformers(run: Route, family: str) -> None:
    router, options = ROUTERS[family]()
    router.weight.copy_(drawn(*router.weight.shape, seed=1))
    logits, weights, expert_ids = router(drawn(123, router.weight.shape[1], seed=2))
    expected = dense(logits.shape[1], expert_ids, weights)
    torch.testing.assert_close(dense(logits.shape[1], *run(logits, **options)), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("scoring", ["softmax", "softmax_chosen", "sigmoid"])
def test_equal_experts_and_equal_groups_go_by_their_index(run: Route, scoring: str) -> None:
    options = {"experts_per_token": 4, "scoring": scoring, "normalise": True}
    expert_ids, weights = run(torch.zeros(2, 64), **options)
    assert expert_ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full((2, 4), 0.25))
    logits = torch.zeros(1, 64)
    logits[0, [9, 40, 63]] = 2.0
    assert run(logits, **options)[0].tolist() == [[9, 40, 63, 0]]
    groups = {"num_groups": 8, "groups_per_token": 2, "group_score": "top2"}
    assert run(logits, **options, **groups)[0].tolist() == [[9, 40, 8, 10]]
    assert run(torch.zeros(1, 64), **options, **groups)[0].tolist() == [[0, 1, 2, 3]]


def test_logits_at_the_ends(run: Route) -> None:
    logits = torch.tensor([[-1e30, 1e30, 0.0, -200.0, 200.0]])
    for scoring, expected in [("softmax", [1.0, 0.0]), ("softmax_chosen", [1.0, 0.0]), ("sigmoid", [0.5, 0.5])]:
        expert_ids, weights = run(logits, experts_per_token=2, scoring=scoring, normalise=True)
        assert expert_ids[0, 0] == 1
        assert weights.tolist() == [expected]


def test_a_token_of_nans_stays_a_token_of_nans(run: Route) -> None:
    logits = drawn(3, 16)
    logits[1, :8] += 5  # without the NaN, its group would be shut
    options = {"experts_per_token": 4, "num_groups": 4, "groups_per_token": 2, "normalise": True}
    for scoring in ("softmax", "softmax_chosen", "sigmoid"):
        clean = run(logits, scoring=scoring, **options)
        spoilt = logits.clone()
        spoilt[1, 14] = float("nan")
        expert_ids, weights = run(spoilt, scoring=scoring, **options)
        assert weights[1].isnan().all()
        assert len(set(expert_ids[1].tolist())) == 4
        assert ((expert_ids >= 0) & (expert_ids < 16)).all()
        for found, before in zip((expert_ids, weights), clean, strict=True):
            assert torch.equal(found[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("case", ["qwen3", "v3", "gpt-oss"])
@pytest.mark.usefixtures("one_thread")
def test_a_token_has_the_same_bits_in_any_batch(library: Library, case: str) -> None:
    num_experts, count, given = CASES[case]
    options = {**PLAIN, **given, "experts_per_token": count}
    logits = drawn(300, num_experts)
    alone = [
        torch.cat(parts) for parts in zip(*(library.moe_route(row[None], **options) for row in logits), strict=True)
    ]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, library.moe_route(logits, **options), alone))


@pytest.mark.parametrize("served", [True, False])
def test_the_launcher_serves_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    logits = drawn(2, 9, seed=5)[:, 1:]  # not contiguous
    options = {"experts_per_token": 2, "scoring": "softmax", "normalise": True}
    expert_ids, weights = moe_route(logits, **options)
    expected_ids, expected = reference(logits, **options)
    assert torch.equal(expert_ids, expected_ids)
    torch.testing.assert_close(weights, expected)
    assert moe_route(logits[:0], num_groups=4, **options)[0].shape == (0, 2)
