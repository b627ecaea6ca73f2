"""GPTQ in the order of activations (desc_act) among ranks: what each computes with, and what it holds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_models import quantise_folder
from ranks import ranked_engine
from safetensors.torch import load_file, save_file
from stepper import Stepper, rows_of, worst_difference
from tiny_adapters import LLAMA_MODULES, merged, write_adapter
from tiny_llama import load_reference, reference_of
from tiny_models import make_model

from bench.quantised_folder import gptq, write_folder
from engine.model_files import open_model
from engine.weights import load_weights
from kernels.linear import PackedLinear
from spec.errors import InvalidConfiguration
from spec.layout import ParallelLayout
from spec.shard import shard_of

TOLERANCE = 1e-4
METHOD = "gptq-int4-order"  # groups of 16
_DRAW = random.Random(6)
TOKENS = [_DRAW.randrange(131) for _ in range(37)]
SIZES = {"hidden_size": 64, "intermediate_size": 96}
STAGE = ParallelLayout(dp=2, mlp="stage")
GATHERED = ParallelLayout(tp=2, mlp="gathered", gathered_tokens=3)


def made(folder: Path, name: str, **sizes: int) -> tuple[Path, Path]:
    """A quantised folder, and one of the values that it stands for."""
    plain = make_model(folder / "plain", name, **sizes)
    values = quantise_folder(plain, folder / "quantised", METHOD)
    (folder / "values").mkdir()
    (folder / "values" / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(values, folder / "values" / "model.safetensors", metadata={"format": "pt"})
    return folder / "quantised", folder / "values"


@pytest.mark.parametrize(
    ("name", "sizes", "layout", "dtype"),
    [
        ("qwen3", {}, ParallelLayout(tp=2, pp=2), "float32"),
        ("qwen3", {}, ParallelLayout(tp=4), "float32"),  # 24 channels: a group of 16 is on two ranks
        ("qwen3", {}, GATHERED, "float32"),
        ("qwen3", {}, GATHERED, "float16"),  # without CPU kernels, and with their bound
        ("llama-odd", {"hidden_size": 72}, ParallelLayout(tp=2), "float32"),
        ("phi4-partial", {}, ParallelLayout(tp=2, dp=2, mlp="stage"), "float32"),
        ("qwen3-moe", {"moe_intermediate_size": 32}, ParallelLayout(tp=2), "float32"),
        (
            "deepseek-v3",
            {"moe_intermediate_size": 32, "v_head_dim": 8, "kv_lora_rank": 16},
            ParallelLayout(tp=2, ep=2),
            "float32",
        ),
    ],
    ids=str,
)
def test_logits_are_those_of_its_values(
    name: str, sizes: dict[str, int], layout: ParallelLayout, dtype: str, tmp_path: Path
) -> None:
    quantised, values = made(tmp_path, name, **SIZES | sizes)
    expected = reference_of(load_reference(values), TOKENS)
    with ranked_engine(quantised, layout, 20, dtype=dtype) as engine:
        found = Stepper(engine).run(TOKENS, 17)
        assert worst_difference(found, expected) < (TOLERANCE if dtype == "float32" else 0.05)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2), STAGE], ids=str)
def test_adapters_are_of_the_same_channels(layout: ParallelLayout, tmp_path: Path) -> None:
    quantised, values = made(tmp_path, "qwen3", **SIZES)
    path = write_adapter(tmp_path / "adapter", load_reference(values), LLAMA_MODULES, 5, 1)
    with ranked_engine(quantised, layout, 20, adapters={"all": path}) as engine:
        stepper = Stepper(engine)
        each = stepper.add("a", TOKENS)
        each.adapter = "all"
        while each.computed < len(TOKENS):
            stepper.step([(each, min(17, len(TOKENS) - each.computed))])
        assert worst_difference(rows_of(each), reference_of(merged(values, path), TOKENS)) < TOLERANCE


def test_groups_of_several_sizes(tmp_path: Path) -> None:
    """Nothing says that a group has as many inputs as another; values are those of the group that each input names."""
    quantised, _ = made(tmp_path, "qwen3", **SIZES)
    file = quantised / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    for name in tensors:
        if name.endswith("down_proj.g_idx"):
            tensors[name] = torch.randint(0, 6, (96,), generator=generator).int()
    save_file(tensors, file)
    files = open_model(quantised)
    (tmp_path / "uneven").mkdir()
    values = {name: files.tensor(name) for name in files.names if name.endswith((".weight", ".bias"))}
    save_file(values, tmp_path / "uneven" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "uneven" / "config.json").write_bytes((tmp_path / "values" / "config.json").read_bytes())
    expected = reference_of(load_reference(tmp_path / "uneven"), TOKENS)
    with ranked_engine(quantised, ParallelLayout(tp=2), 20) as engine:
        assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE


def test_weights_of_other_sizes_on_each_rank_do_not_pass(tmp_path: Path) -> None:
    quantised, _ = made(tmp_path, "qwen3", **SIZES)
    files = open_model(quantised)
    shard = shard_of(files.spec, ParallelLayout(tp=4, mlp="gathered"), 0)
    with pytest.raises(InvalidConfiguration, match=r"desc_act.*a group of 16 is cut"):
        load_weights(files, shard, torch.float32, torch.device("cpu"))


def test_a_rank_holds_its_share_to_three_percent(tmp_path: Path) -> None:
    """Of the projections, by what the format takes: four bits a weight, and a scale and a zero point per group."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 128}
    plain = make_model(tmp_path / "plain", "llama3", **sizes)
    write_folder(plain, tmp_path / "quantised", gptq(128, in_order=False))
    files = open_model(tmp_path / "quantised")
    spec = files.spec
    whole = (spec.attention_parameters + spec.mlp_parameters(0, active=True)) * (0.5 + (2 + 4) / 128)
    for layout in (ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(tp=4), ParallelLayout(dp=4, mlp="stage")):
        for rank in range(layout.num_ranks):
            weights = load_weights(files, shard_of(spec, layout, rank), torch.bfloat16, torch.device("cpu"))
            attention = spec.attention_parameters / (spec.attention_parameters + spec.mlp_parameters(0, active=True))
            share = attention / layout.tp + (1 - attention) / layout.dense_tp
            held = sum(map(bytes_of, packed_in(weights.layers)))
            assert held == pytest.approx(whole * share, rel=0.03), (layout, rank)


def packed_in(part: Any) -> Iterator[PackedLinear]:
    if isinstance(part, PackedLinear):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from packed_in(each)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from packed_in(getattr(part, field.name))


def bytes_of(packed: PackedLinear) -> int:
    """All that is kept of a weight, with the order of its columns."""
    tensors = [packed.weight, packed.order]
    if packed.quantised is not None:
        tensors += packed.quantised.tensors()[1:]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
