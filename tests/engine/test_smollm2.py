"""The real model, from GGUF: against transformers on the folder that `convert_gguf` wrote, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stepper import Stepper, worst_difference
from tiny_llama import load_reference, reference_of

from engine.convert import convert_gguf
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from scheduler.plan import Draw, Slice, StepPlan
from service.model_source import resolve_model
from spec.dtype import Dtype
from spec.gguf import read_header
from spec.sampling import SamplingParams

START, END = "<|im_start|>", "<|im_end|>"
WORDS = ["What", "Ġis", "Ġthe", "Ġcapital", "Ġof", "ĠFrance", "?"]
QUESTION = [START, "user", "Ċ", *WORDS, END, "Ċ", START, "ass", "istant", "Ċ"]


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    return resolve_model("smollm2")


@pytest.fixture(scope="module")
def engine(gguf_path: Path) -> Engine:
    return Engine(open_model(gguf_path), EngineOptions(dtype="float32", device="cpu"), 40)


@pytest.fixture(scope="module")
def oracle(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    convert_gguf(gguf_path, folder, dtype=Dtype.FLOAT32)
    return load_reference(folder)


@pytest.fixture(scope="module")
def question(gguf_path: Path) -> tuple[int, ...]:
    words = read_header(gguf_path).metadata["tokenizer.ggml.tokens"]
    return tuple(words.index(word) for word in QUESTION)


def test_logits_and_answer(engine: Engine, oracle: Any, question: tuple[int, ...]) -> None:
    generated = oracle.generate(torch.tensor([question]), max_new_tokens=20, do_sample=False)[0].tolist()
    found: list[int] = []
    table, greedy = tuple(range(4)), SamplingParams(temperature=0.0)
    pending, start = question, 0
    while len(found) < 20 and found[-1:] != [2]:
        each = Draw(greedy, start + len(pending), len(question), ())
        ((drawn,),) = engine.execute(StepPlan(0, (Slice("a", pending, start, table, each),))).drawn
        start, pending = start + len(pending), (drawn.token_id,)
        found.append(drawn.token_id)
    assert [*question, *found] == generated
    assert found[-1] == 2
    expected = reference_of(oracle, generated)
    for chunk in (None, 7):
        assert worst_difference(Stepper(engine).run(generated, chunk), expected) < 1e-4


def test_configuration(gguf_path: Path) -> None:
    spec = open_model(gguf_path).spec
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 576, 9, 3, 64)
    assert (spec.vocab_size, spec.max_context_tokens, spec.ropes[0].theta, spec.tie_embeddings) == (
        49152,
        8192,
        1e5,
        True,
    )
    assert (spec.rms_norm_eps, spec.bos_token_id, spec.eos_token_ids) == (1e-5, 1, (2,))
    assert EngineOptions().dtype_for(spec) is Dtype.BFLOAT16
