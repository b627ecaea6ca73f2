"""Sizes of published models, and how layouts share them out."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from spec.dtype import Dtype
from spec.errors import InvalidModel
from spec.hf_config import model_from_hf
from spec.layout import ParallelLayout
from spec.model import ModelSpec
from spec.shard import check_layout, imbalance, place_experts, replicas_for, shard_of, split, stage_layers

LLAMA_405B = {
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "num_hidden_layers": 126,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 36,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
}
# 1.8 T parameters: 120 layers of plain multi-head attention and 16 experts of which a token goes through two
GPT_MOE_1_8T = {
    "model_type": "mixtral",
    "hidden_size": 10752,
    "intermediate_size": 28672,
    "num_attention_heads": 84,
    "num_key_value_heads": 84,
    "num_hidden_layers": 120,
    "vocab_size": 100352,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("config", "billions", "active"),
    [(LLAMA_405B, 405.8, 403.7), (DEEPSEEK_V3, 671.0, 36.6), (GPT_OSS_120B, 116.8, 5.1), (GPT_MOE_1_8T, 1833, 279)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_parameters_are_those_that_are_published(config: dict, billions: float, active: float) -> None:
    spec = model_from_hf(config)
    assert spec.num_parameters / 1e9 == pytest.approx(billions, rel=2e-3)
    assert spec.num_read_parameters / 1e9 == pytest.approx(active, rel=1e-2)


def test_a_token_of_deepseek_caches_70_kilobytes() -> None:
    """arXiv:2412.19437: (512 + 64) values a layer, once for all 128 heads."""
    layout = model_from_hf(DEEPSEEK_V3).kv_layout(16, Dtype.BFLOAT16)
    assert layout.token_bytes == 61 * 576 * 2


@pytest.mark.parametrize("text", ["pp8-tp8", "pp16-tp4", "tp8-dp8-ep64", "ep16-tp4-dp16", "pp4-tp4-dp4", "ep8-pp8-tp8"])
def test_layouts_of_64_ranks_hold_every_part_once(text: str) -> None:
    spec, layout = (
        model_from_hf(GPT_MOE_1_8T | {"num_local_experts": 64, "num_attention_heads": 96, "num_key_value_heads": 96}),
        ParallelLayout.parse(text),
    )
    shards = [shard_of(spec, layout, rank) for rank in range(layout.num_ranks)]
    assert layout.num_ranks == 64
    for stage, group in itertools.product(range(layout.pp), range(layout.dp)):
        own = [shard for shard in shards if (shard.stage, shard.group) == (stage, group)]
        for part, size in (("heads", 96), ("kv_heads", 96), ("vocab", spec.vocab_size), ("intermediate", 28672)):
            assert sorted(i for shard in own for i in getattr(shard, part)) == list(range(size)), part
    for stage in range(layout.pp):
        own = [shard for shard in shards if shard.stage == stage]
        held = sorted(
            (expert, column)
            for shard in own
            for expert in shard.experts[0]
            for column in shard.expert_intermediate[::1024]
        )
        assert len({(e, c // 1024) for e, c in held}) == 64 * 28
    layers = [layer for stage in range(layout.pp) for layer in next(s for s in shards if s.stage == stage).layers]
    assert layers == list(range(120))


def test_stages_are_as_even_as_they_can_be() -> None:
    """Against every way to cut ten layers into three."""
    generator = random.Random(3)
    spec = dataclasses.replace(model_from_hf(LLAMA_405B))
    spec = dataclasses.replace(spec, layers=spec.layers[:10])
    for _ in range(50):
        costs = tuple(generator.uniform(0.5, 3.0) for _ in range(10))
        head = generator.uniform(0.0, 6.0)

        def worst(bounds: tuple[int, ...], costs: tuple[float, ...] = costs, head: float = head) -> float:
            stages = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
            stages[-1] += head
            return max(stages)

        best = min(worst((0, a, b, 10)) for a, b in itertools.combinations(range(1, 10), 2))
        found = stage_layers(spec, 3, costs, head)
        assert worst((0, *(stage.stop for stage in found))) == pytest.approx(best)


def test_kv_heads_are_replicated_where_ranks_exceed_them() -> None:
    spec = model_from_hf(LLAMA_405B)
    shards = [shard_of(spec, ParallelLayout(tp=16), rank) for rank in range(16)]
    assert [list(shard.kv_heads) for shard in shards] == [[rank // 2] for rank in range(16)]
    assert [list(shard.heads) for shard in shards] == [list(range(8 * rank, 8 * rank + 8)) for rank in range(16)]


def test_ranks_of_one_index_have_the_vocabulary_of_the_index_together() -> None:
    spec = model_from_hf(LLAMA_405B | {"vocab_size": 1009})
    shards = [shard_of(spec, ParallelLayout(tp=2, dp=3, mlp="stage"), rank) for rank in range(6)]
    for index in range(2):
        held = [token for shard in shards if shard.index == index for token in shard.held_vocab]
        assert held == list(shards[index].vocab) == list(split(1009, 2, index))
    columns = sorted(column for shard in shards for column in shard.intermediate)
    assert columns == list(range(spec.intermediate_size))
    assert [shard.heads for shard in shards[:2]] * 3 == [shard.heads for shard in shards]


def test_an_uneven_split_is_as_even_as_can_be() -> None:
    for total, parts in itertools.product((1, 3, 7, 64, 131), (1, 2, 3, 5)):
        runs = [split(total, parts, part) for part in range(parts)]
        assert [i for run in runs for i in run] == list(range(total))
        assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_replicas_go_where_fewest_experts_are() -> None:
    assert place_experts(6, 3, {0: 2, 5: 3}) == [(0, 1, 5), (2, 3, 5), (4, 5, 0)]
    assert place_experts(4, 2, {1: 9}) == [(0, 1), (2, 3, 1)]


def test_hot_experts_are_replicated_until_their_copies_are_even() -> None:
    loads = [[100, 1, 1, 40], [5, 5, 5, 5], [0, 0, 0, 0]]
    assert replicas_for(loads, parts=4, copies=3) == {0: {0: 3, 3: 2}, 1: {0: 2, 1: 2, 2: 2}}
    assert replicas_for([[9, 0]], parts=2, copies=5) == {0: {0: 2}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 129}, "can be chosen"),
        ({"n_group": 7}, "equal groups"),
        ({"qk_rope_head_dim": 63}, "rotary"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers must be a whole number"),
    ],
)
def test_a_config_whose_sizes_do_not_fit(changes: dict, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        model_from_hf(DEEPSEEK_V3 | changes)


def test_every_layout_is_checked_before_it_is_built() -> None:
    spec: ModelSpec = model_from_hf(DEEPSEEK_V3)
    for tp, dp, pp in itertools.product((1, 2, 8), (1, 4), (1, 8)):
        layout = ParallelLayout(tp, pp, dp, ep=tp * dp)
        check_layout(spec, layout)
        assert sum(len(stage) for stage in stage_layers(spec, pp)) == 61


def test_imbalance_is_of_the_busiest_part() -> None:
    loads = [[30, 10, 10, 10], [0, 0, 0, 0], [5, 5, 5, 5]]
    assert imbalance(loads, 2, {}) == pytest.approx((40 / 30 + 1.0) / 2)
    # The first expert in both parts: 15 + 10 and 10 + 10 + 15.
    assert imbalance(loads, 2, {0: {0: 2}}) == pytest.approx((35 / 30 + 1.0) / 2)
    assert imbalance([[0, 0]], 2, {}) == 1.0
