"""A decode step on a GPU waits nowhere for the device, so that it can be captured: shown without one.

Every tensor of the decoder is made a fake one, which has a shape and no content, and says that it lies on a GPU. So the
code for a GPU runs, kernels launched but not executed, and whatever would look at what a tensor holds (item, tolist,
nonzero, a mask as an index, a copy to the host that is read) raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from triton.runtime.jit import JITFunction

from engine.cuda_graphs import DecodeInputs, spare_blocks, waits_for_the_device
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.weights import Quantisation
from kernels import grouped_linear, grouped_quantised_linear, moe_mlp, paged_attention_gpu
from kernels.cpu import library as library_module

GROUPED, GROUPED_QUANTISED = grouped_linear._kernel, grouped_quantised_linear._kernel
ATTENTION = paged_attention_gpu._attend_kernel
CPU = torch.device("cpu")  # torch without CUDA cannot index what says that its device is another


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Functions of the kernels, in order; none is executed. No library of the CPU packs any weight."""
    kernels: list[Any] = []
    monkeypatch.setattr(library_module, "shared_library", lambda: None)
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, **__: kernels.append(self.fn))
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: id(self), raising=False)
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda self: True), raising=False)
    return kernels


@pytest.fixture
def faking() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def on_gpu(value: Any, mode: FakeTensorMode) -> Any:
    """The same, with fake tensors on the GPU in place of those that it holds."""
    if isinstance(value, torch.Tensor):
        return FakeTensor(mode, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"), CPU)
    if dataclasses.is_dataclass(value):
        fields = {field.name: on_gpu(getattr(value, field.name), mode) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)  # type: ignore[type-var]
    if isinstance(value, dict):
        return {key: on_gpu(each, mode) for key, each in value.items()}
    return type(value)(on_gpu(each, mode) for each in value) if isinstance(value, tuple | list) else value


def decoder_on_gpu(folder: Path, mode: FakeTensorMode, quantisation: Quantisation = "auto") -> tuple[Any, Any]:
    """The decoder, and a step of seven rows, padded to eight."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        engine = Engine(
            open_model(folder), EngineOptions(dtype="bfloat16", device="cpu", quantisation=quantisation), 30
        )
        decoder = engine.decoder
        first_spare = 30 - spare_blocks(engine.kv.layout)
        step = DecodeInputs(engine.kv.layout, first_spare, 7, 200, torch.device("cpu")).step(8)
        assert not waits_for_the_device(decoder.weights)
    decoder.weights = on_gpu(decoder.weights, mode)
    decoder.rope_tables = on_gpu(decoder.rope_tables, mode)
    decoder.kv._layers = on_gpu(decoder.kv._layers, mode)
    if decoder.experts is not None:
        for name in ("loads", "_holders", "_slots"):
            setattr(decoder.experts, name, on_gpu(getattr(decoder.experts, name), mode))
    return decoder, on_gpu(step, mode)


@pytest.mark.parametrize("name", ["llama3", "mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "gemma2"])
@torch.inference_mode()
def test_a_decode_step_never_waits(tmp_path: Path, launched: list[Any], name: str, faking: FakeTensorMode) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        folder = make_model(tmp_path, name)
    decoder, step = decoder_on_gpu(folder, faking)
    hidden = decoder.compute(decoder.embed(step.token_ids), step)
    logits = decoder.logits(hidden)
    assert logits.is_cuda
    assert logits.shape == (8, decoder.spec.vocab_size)
    num_moe = sum(layer.is_moe for layer in decoder.spec.layers)
    assert launched.count(GROUPED.fn) == 2 * num_moe
    assert launched.count(ATTENTION.fn) == decoder.spec.num_layers


@pytest.mark.parametrize("quantisation", ["int8", "int4", "fp8"])
@torch.inference_mode()
def test_a_decode_step_of_quantised_experts_never_waits(
    tmp_path: Path, launched: list[Any], quantisation: Quantisation, faking: FakeTensorMode
) -> None:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        folder = make_model(tmp_path, "qwen3-moe")
    decoder, step = decoder_on_gpu(folder, faking, quantisation)
    decoder.compute(decoder.embed(step.token_ids), step)
    assert launched.count(GROUPED_QUANTISED.fn) == 2 * sum(layer.is_moe for layer in decoder.spec.layers)
    assert GROUPED.fn not in launched


@torch.inference_mode()
def test_a_wait_is_seen(
    tmp_path: Path, launched: list[Any], monkeypatch: pytest.MonkeyPatch, faking: FakeTensorMode
) -> None:
    """Experts one by one, as ordered ones are computed: the host asks how many rows each has."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        folder = make_model(tmp_path, "mixtral")
    decoder, step = decoder_on_gpu(folder, faking)
    monkeypatch.setattr(moe_mlp, "launch", moe_mlp.reference)
    with pytest.raises(DataDependentOutputException):
        decoder.compute(decoder.embed(step.token_ids), step)
