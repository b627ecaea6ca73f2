"""Quantised checkpoints against transformers on the weights that they stand for, in float32."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantised_models import METHODS, quantise_folder
from ranks import ranked_engine
from safetensors.torch import load_file, save_file
from stepper import Stepper, worst_difference
from tiny_llama import load_reference, reference_of
from tiny_models import make_model

from bench.integer_checkpoints import gptq
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.weights import load_weights
from kernels.linear import PackedLinear
from spec.errors import InvalidConfiguration, InvalidModel, UnsupportedModel
from spec.layout import ParallelLayout
from spec.shard import shard_of

TOLERANCE = 1e-4
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # whole groups of 16 and 32


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("plain"), "qwen3", **SIZES)


def oracle_of(plain: Path, values: dict[str, torch.Tensor], token_ids: list[int]) -> Any:
    """transformers' own loader turns names into those of its modules; so the values go through a folder."""
    folder = plain.parent / f"values-{random.getrandbits(40):x}"
    folder.mkdir()
    (folder / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return reference_of(load_reference(folder), token_ids)


TOKENS = [random.Random(5).randrange(131) for _ in range(41)]


@pytest.mark.parametrize("method", METHODS)
def test_logits_are_those_of_the_weights_it_stands_for(method: str, plain: Path, tmp_path: Path) -> None:
    values = quantise_folder(plain, tmp_path / "quantised", method)
    expected = oracle_of(plain, values, TOKENS)
    files = open_model(tmp_path / "quantised")
    for quantisation in ("auto", "none"):
        engine = Engine(files, EngineOptions(dtype="float32", device="cpu", quantisation=quantisation), 20)
        assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE, quantisation


def round_inputs(model: torch.nn.Module) -> None:
    """Every linear layer but the head takes rows rounded to E4M3, in blocks of 128 by a power of two."""

    def rounded(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        blocks = arguments[0].split(128, dim=-1)
        scales = [2.0 ** torch.ceil(torch.log2(block.abs().amax(-1, keepdim=True) / 448)) for block in blocks]
        codes = [(block / scale).to(torch.float8_e4m3fn) for block, scale in zip(blocks, scales, strict=True)]
        return (torch.cat([code.float() * scale for code, scale in zip(codes, scales, strict=True)], dim=-1),)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded)


@pytest.mark.parametrize(
    ("method", "is_dynamic"), [("fp8-blocks", True), ("fp8-channels", True), ("fp8-tensor", False)]
)
def test_rows_are_rounded_where_files_say_so_and_it_is_wanted(
    method: str, is_dynamic: bool, plain: Path, tmp_path: Path
) -> None:
    """A row that differs in its last bit may get another code: what is far less than rounding itself changes."""
    values = quantise_folder(plain, tmp_path / "quantised", method)
    (tmp_path / "values").mkdir()
    (tmp_path / "values" / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(values, tmp_path / "values" / "model.safetensors", metadata={"format": "pt"})
    model = load_reference(tmp_path / "values")
    kept = reference_of(model, TOKENS)
    round_inputs(model)
    rounded = reference_of(model, TOKENS)
    options = {"dtype": "float32", "device": "cpu", "activations": "stored"}
    found = Stepper(Engine(open_model(tmp_path / "quantised"), EngineOptions(**options), 20)).run(TOKENS, 17)
    if is_dynamic:
        assert worst_difference(found, rounded) < 0.2 * worst_difference(found, kept)
    else:
        assert worst_difference(found, kept) < TOLERANCE


@pytest.mark.parametrize("method", ["gptq-int4", "gptq-int8-order", "fp8-blocks", "nvfp4"])
def test_it_is_cut_among_ranks(method: str, plain: Path, tmp_path: Path) -> None:
    values = quantise_folder(plain, tmp_path / "quantised", method)
    expected = oracle_of(plain, values, TOKENS)
    with ranked_engine(tmp_path / "quantised", ParallelLayout(tp=2, pp=2), 20, dtype="float32") as engine:
        assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "method", "layout"),
    [
        ("gpt-oss", "mxfp4", ParallelLayout()),
        ("gpt-oss", "mxfp4", ParallelLayout(dp=2, ep=2)),
        ("deepseek-v3", "fp8-blocks", ParallelLayout()),
        ("deepseek-v3", "fp8-blocks", ParallelLayout(tp=2, ep=2)),
        ("qwen3-moe", "awq", ParallelLayout()),
    ],
    ids=str,
)
def test_mixtures_of_experts(name: str, method: str, layout: ParallelLayout, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    if name == "deepseek-v3":
        sizes |= {"kv_lora_rank": 16, "q_lora_rank": 16, "moe_intermediate_size": 32, "v_head_dim": 8}
    plain = make_model(tmp_path / "plain", name, **sizes)
    values = quantise_folder(plain, tmp_path / "quantised", method)
    expected = oracle_of(plain, values, TOKENS)
    with ranked_engine(tmp_path / "quantised", layout, 20, dtype="float32") as engine:
        assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("llama-odd", "fp8-strategy-block"),
        ("llama-odd", "fp8-tensor"),
        ("phi4-partial", "fp8-strategy-block"),
        ("phi4-partial", "gptq-int4-order"),
        ("gemma2", "awq"),
    ],
)
def test_odd_sizes_and_fused_projections(name: str, method: str, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", name)
    values = quantise_folder(plain, tmp_path / "quantised", method)
    expected = oracle_of(plain, values, TOKENS)
    engine = Engine(open_model(tmp_path / "quantised"), EngineOptions(dtype="float32", device="cpu"), 20)
    assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE


@pytest.mark.parametrize("in_order", [True, False])
def test_a_head_may_be_quantised_too(in_order: bool, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", "llama3", vocab_size=136)
    values = quantise_folder(plain, tmp_path / "quantised", "gptq-int4-order")
    file = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(file)
    parts, values["lm_head.weight"] = gptq(tensors.pop("lm_head.weight"), group=16, in_order=in_order)
    save_file(tensors | {f"lm_head.{suffix}": part for suffix, part in parts.items()}, file)
    expected = oracle_of(plain, values, TOKENS)
    engine = Engine(open_model(tmp_path / "quantised"), EngineOptions(dtype="float32", device="cpu"), 20)
    assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE


def test_a_cut_group_is_said(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", "qwen3", hidden_size=64, intermediate_size=80, head_dim=16)
    quantise_folder(plain, tmp_path / "quantised", "nvfp4")
    files = open_model(tmp_path / "quantised")
    with pytest.raises(InvalidConfiguration, match=r"tp2 cuts 80 columns at 0 and 40.*group of 16"):
        load_weights(files, shard_of(files.spec, ParallelLayout(tp=2), 0), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("kind", "bytes_each"), [("int8", 1.0), ("fp8", 1.0), ("int4", 0.5625)])
def test_a_plain_model_is_quantised_as_it_is_loaded(kind: str, bytes_each: float, tmp_path: Path) -> None:
    """The weights take what the kind says, and the logits stay near: int4 by about a tenth of their size."""
    plain = make_model(tmp_path / "plain", "llama3", hidden_size=256, intermediate_size=512, head_dim=32)
    files = open_model(plain)
    engine = Engine(files, EngineOptions(dtype="float32", device="cpu", quantisation=kind), 20)
    expected = reference_of(load_reference(plain), TOKENS)
    found = Stepper(engine).run(TOKENS)
    error = worst_difference(found, expected)
    assert 1e-5 < error < {"int8": 0.06, "fp8": 0.2, "int4": 0.5}[kind]
    down: PackedLinear = engine.decoder.weights.layers[0].mlp.down.base
    held = down.weight.untyped_storage().nbytes()
    assert held < 1.15 * (bytes_each * down.n * down.k + 4 * down.n)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_plain_model_becomes_the_same_in_every_layout(kind: str, tmp_path: Path) -> None:
    """A weight is quantised whole and then cut: logits of ranks are those of one process."""
    plain = make_model(tmp_path / "plain", "llama3", hidden_size=128, intermediate_size=256, head_dim=32)
    options = {"dtype": "float32", "quantisation": kind}
    expected = Stepper(Engine(open_model(plain), EngineOptions(device="cpu", **options), 20)).run(TOKENS, 17)
    with ranked_engine(plain, ParallelLayout(tp=2, pp=2), 20, **options) as engine:
        assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"quant_method": "eetq"}, UnsupportedModel, "eetq.*gptq"),
        ({"quant_method": "gptq", "bits": 3}, UnsupportedModel, "3 bits"),
        ({"quant_method": "gptq", "bits": "four"}, UnsupportedModel, "four bits"),
        ({"quant_method": "gptq", "bits": [4]}, UnsupportedModel, "bits"),
        ({"quant_method": "awq", "version": 3}, UnsupportedModel, "gemm"),
        ({"quant_method": "awq", "group_size": "x"}, InvalidModel, "group_size"),
        ({"quant_method": ["awq"]}, UnsupportedModel, "quant_method"),
        ("awq", InvalidModel, "quantization_config must be an object"),
        ([1], InvalidModel, "quantization_config must be an object"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, UnsupportedModel, "gemm"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, UnsupportedModel, "pack-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, UnsupportedModel, "NVFP4_AWQ.*W4A16_NVFP4"),
    ],
)
def test_what_is_not_known_is_refused(config: object, error: type, words: str, plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", "awq")
    file = tmp_path / "quantised" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    with pytest.raises(error, match=words):
        open_model(tmp_path / "quantised")


@pytest.mark.parametrize("method", ["gptq-int4-order", "gptq-int8-order"])
def test_any_inputs_may_share_a_scale(method: str, plain: Path, tmp_path: Path) -> None:
    """As desc_act has it: what is read is what NumPy reads by g_idx, and it stays in codes, fused."""
    quantise_folder(plain, tmp_path / "quantised", method)
    stored = load_file(tmp_path / "quantised" / "model.safetensors")
    files = open_model(tmp_path / "quantised")
    bits = 4 if "int4" in method else 8
    shifts = np.arange(0, 32, bits)
    for projection in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj"):
        stem = f"model.layers.2.{projection}"
        parts = {suffix: stored[f"{stem}.{suffix}"].numpy() for suffix in ("qweight", "qzeros", "scales", "g_idx")}
        assert (np.diff(parts["g_idx"]) < 0).any()
        codes = (parts["qweight"][:, None, :] >> shifts[:, None] & 2**bits - 1).reshape(-1, parts["qweight"].shape[1])
        zeros = (parts["qzeros"][:, :, None] >> shifts & 2**bits - 1).reshape(parts["qzeros"].shape[0], -1) + 1
        group_of = parts["g_idx"]
        expected = parts["scales"].astype(np.float64)[group_of] * (codes - zeros[group_of])
        np.testing.assert_allclose(files.tensor(f"{stem}.weight").double().numpy(), expected.T, rtol=0, atol=1e-6)
    layer = Engine(files, EngineOptions(device="cpu"), 20).decoder.weights.layers[2]
    for projection in (layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down):
        assert (projection.base.order is None) == (projection is layer.mlp.down), "channels are in the order of down"
        assert projection.base.weight.dtype == torch.uint8


def test_groups_that_are_not_there_are_said(plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", "gptq-int4-order")
    file = tmp_path / "quantised" / "model.safetensors"
    for outside in (-1, 4):
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.g_idx"][7] = outside
        save_file(tensors, file)
        with pytest.raises(InvalidModel, match=r"up_proj\.g_idx"):
            Engine(open_model(tmp_path / "quantised"), EngineOptions(device="cpu"), 20)


@pytest.mark.parametrize("method", ["gptq-int4", "fp8-blocks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", TOLERANCE), ("float16", 0.05)])  # float16: no CPU kernels
def test_weights_pass_from_rank_to_rank(method: str, dtype: str, tolerance: float, plain: Path, tmp_path: Path) -> None:
    values = quantise_folder(plain, tmp_path / "quantised", method)
    expected = oracle_of(plain, values, TOKENS)
    layout = ParallelLayout(tp=2, mlp="gathered", gathered_tokens=3)
    with ranked_engine(tmp_path / "quantised", layout, 20, dtype=dtype) as engine:
        assert worst_difference(Stepper(engine).run(TOKENS, 17), expected) < tolerance


def test_a_quantised_tensor_that_is_missing_is_said(plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", "gptq-int4")
    file = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.qweight"]
    save_file(tensors, file)
    with pytest.raises(InvalidModel, match="up_proj"):
        open_model(tmp_path / "quantised")


@pytest.mark.parametrize("scales", [(7, 1), (5,), (4, 4, 1), (2, 5)])
@pytest.mark.parametrize("method", ["fp8-strategy-block", "fp8-channels", "fp8-blocks"])
def test_scales_of_fp8_that_fit_nothing_are_said(
    method: str, scales: tuple[int, ...], plain: Path, tmp_path: Path
) -> None:
    quantise_folder(plain, tmp_path / "quantised", method)
    file = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "up_proj.weight_scale" in name:
            tensors[name] = torch.ones(scales)
    save_file(tensors, file)
    with pytest.raises(InvalidModel, match=r"up_proj\.weight_scale.*one per output"):
        open_model(tmp_path / "quantised")


@pytest.mark.parametrize(
    ("block", "error"),
    [
        ("x", InvalidModel),
        ([16], InvalidModel),
        ([0, 0], InvalidModel),
        ([16, True], InvalidModel),
        ([16, 4], UnsupportedModel),
    ],
)
def test_a_block_that_is_none_is_said(block: Any, error: type[Exception], plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", "fp8-blocks")
    file = tmp_path / "quantised" / "config.json"
    config = {"quant_method": "fp8", "weight_block_size": block}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    with pytest.raises(error, match="a block of FP8"):
        open_model(tmp_path / "quantised")


def test_older_folders_of_modelopt_say_it_in_a_file_of_its_own(plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", "nvfp4-modelopt")
    expected = open_model(tmp_path / "quantised").tensor("model.layers.0.mlp.up_proj.weight")
    config, file = tmp_path / "quantised" / "config.json", tmp_path / "quantised" / "hf_quant_config.json"
    settings = json.loads(config.read_text())
    del settings["quantization_config"]
    config.write_text(json.dumps(settings))
    with pytest.raises(InvalidModel, match="expected"):
        open_model(tmp_path / "quantised")
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}))
    assert torch.equal(open_model(tmp_path / "quantised").tensor("model.layers.0.mlp.up_proj.weight"), expected)
    file.write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    with pytest.raises(UnsupportedModel, match="W4A8_AWQ"):
        open_model(tmp_path / "quantised")
    file.write_text("[]")
    with pytest.raises(InvalidModel, match="hf_quant_config"):
        open_model(tmp_path / "quantised")


@pytest.mark.parametrize(("method", "part"), [("nvfp4", "weight_global_scale"), ("nvfp4-modelopt", "weight_scale_2")])
def test_a_scale_of_a_tensor_is_above_0(method: str, part: str, plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", method)
    file = tmp_path / "quantised" / "model.safetensors"
    for wrong in (0.0, float("nan"), float("inf")):
        tensors = load_file(file)
        tensors[f"model.layers.1.mlp.up_proj.{part}"].fill_(wrong)
        save_file(tensors, file)
        with pytest.raises(InvalidModel, match=rf"up_proj\.{part}"):
            Engine(open_model(tmp_path / "quantised"), EngineOptions(device="cpu"), 20)


GPTQ_PARTS, AWQ_PARTS = ("qweight", "qzeros", "scales", "g_idx"), ("qweight", "qzeros", "scales")
MXFP4_PARTS = ("down_proj_blocks", "down_proj_scales")
PARTS = {
    "gptq-int4": GPTQ_PARTS,
    "gptq-int8": GPTQ_PARTS,
    "awq": AWQ_PARTS,
    "fp8-blocks": ("weight", "weight_scale_inv"),
    "fp8-channels": ("weight", "weight_scale"),
    "nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "nvfp4-modelopt": ("weight", "weight_scale", "weight_scale_2"),
    "mxfp4-compressed": ("weight_packed", "weight_scale"),
    "mxfp4": MXFP4_PARTS,
}
DAMAGES = {
    "missing": lambda tensor: None,
    "short": lambda tensor: tensor[:-1] if tensor.numel() > 1 else torch.ones(3),
    "narrow": lambda tensor: tensor[..., :-1] if tensor.numel() > 1 and tensor.shape[-1] > 1 else torch.ones(5, 5),
    "of one more dimension": lambda tensor: tensor[None, None],
    "empty": lambda tensor: tensor.reshape(-1)[:0] if tensor.dim() == 0 else tensor[:0],
    "of another type": lambda tensor: tensor.double(),
}


@pytest.fixture(scope="module")
def undamaged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("undamaged")
    gpt_oss = make_model(base / "gpt-oss", "gpt-oss", hidden_size=64, intermediate_size=64)
    for method in PARTS:
        quantise_folder(gpt_oss if method == "mxfp4" else plain, base / method, method)
    return {method: base / method for method in PARTS}


@pytest.mark.parametrize(("method", "part"), [(method, part) for method, parts in PARTS.items() for part in parts])
def test_damage_is_found_when_the_folder_is_opened(
    method: str, part: str, undamaged: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(undamaged[method] / "model.safetensors")
    stem = "model.layers.1.mlp.experts." if method == "mxfp4" else "model.layers.1.mlp.up_proj."
    (tmp_path / "config.json").write_bytes((undamaged[method] / "config.json").read_bytes())
    for damage, change in DAMAGES.items():
        if (damage, part) == ("missing", "g_idx"):  # without it the groups are in order
            continue
        damaged = {name: tensor for name, tensor in tensors.items() if name != stem + part}
        if (tensor := change(tensors[stem + part])) is not None:
            damaged[stem + part] = tensor.contiguous()
        save_file(damaged, tmp_path / "model.safetensors")
        print(damage)
        with pytest.raises(InvalidModel, match=stem.split(".")[-2]):
            open_model(tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 100])
def test_groups_are_those_of_the_configuration(rows: int, plain: Path, tmp_path: Path) -> None:
    quantise_folder(plain, tmp_path / "quantised", "awq")
    file = tmp_path / "quantised" / "model.safetensors"
    tensors = load_file(file)
    for part in ("scales", "qzeros"):
        name = f"model.layers.0.mlp.up_proj.{part}"
        tensors[name] = tensors[name][:1].expand(rows, -1).contiguous()
    save_file(tensors, file)
    with pytest.raises(InvalidModel, match="up_proj"):
        open_model(tmp_path / "quantised")
