"""What a captured step is given: its size, its rows and its padding, which a CPU can compute as well as a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llama import SHAPES, make_llama
from tiny_models import make_model
from torch import Tensor

from engine.cuda_graphs import CapturedDecodes, DecodeInputs, can_capture, is_plain_decode, sizes_up_to, spare_blocks
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.sampling import draw
from kernels.cpu.library import shared_library
from scheduler.plan import NO_TOKEN, Draw, Proposal, Slice, StepPlan
from spec.layout import ParallelLayout
from spec.sampling import SamplingParams
from spec.shard import shard_of

GREEDY = SamplingParams(temperature=0.0)
NUM_BLOCKS = 60
DECODE = Slice("a", (7,), 3, (0,), Draw(GREEDY, 4, 2, ()))


def test_sizes() -> None:
    assert sizes_up_to(1) == (1,)
    assert sizes_up_to(3) == (1, 2, 4)
    assert sizes_up_to(8) == (1, 2, 4, 8)
    assert sizes_up_to(9) == (1, 2, 4, 8, 16)
    assert sizes_up_to(30) == (1, 2, 4, 8, 16, 24, 32)
    for most in range(1, 70):
        sizes = sizes_up_to(most)
        assert sizes[-1] >= most
        assert all(after - before - 1 <= 7 for before, after in zip((0, *sizes), sizes, strict=False))


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": (7, 8)},
        {"draw": None},
        {"adapter": "one"},
        {"prompt_logprobs": 0},
        {"guessed_token_ids": (3,)},
        {"proposal": Proposal((7,), 3, 2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_plain_decode(change: dict[str, object]) -> None:
    assert is_plain_decode(DECODE)
    assert not is_plain_decode(DECODE._replace(**change))


def test_who_captures(tmp_path: Path) -> None:
    spec, cuda = open_model(make_llama(tmp_path, SHAPES[0])).spec, torch.device("cuda")
    assert can_capture(spec, shard_of(spec, ParallelLayout(), 0), cuda)
    assert not can_capture(spec, shard_of(spec, ParallelLayout(), 0), torch.device("cpu"))
    experts = open_model(make_model(tmp_path / "mixtral", "mixtral")).spec
    for layout in (ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(pp=2), ParallelLayout(tp=2, ep=2)):
        assert can_capture(experts, shard_of(experts, layout, 0), cuda)
    assert not can_capture(experts, shard_of(experts, ParallelLayout(dp=2, ep=2), 0), cuda)
    assert can_capture(spec, shard_of(spec, ParallelLayout(dp=2), 0), cuda)


@pytest.fixture(
    scope="module", params=[("float32", "auto", 4), ("bfloat16", "auto", 16), ("float32", "int8", 3)], ids=str
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    dtype, kv_dtype, block_tokens = request.param
    folder = make_llama(tmp_path_factory.mktemp("llama"), SHAPES[0])
    options = EngineOptions(dtype=dtype, kv_dtype=kv_dtype, device="cpu", block_tokens=block_tokens)
    return Engine(open_model(folder), options, NUM_BLOCKS)


def _prefilled(engine: Engine, lengths: list[int], first_spare: int) -> tuple[Slice, ...]:
    """Sequences whose first `length` tokens are in the KV memory, and the decode of the next one."""
    blocks = list(range(first_spare))
    drawn = random.Random(len(lengths))
    drawn.shuffle(blocks)
    slices = []
    for row, length in enumerate(lengths):
        count = engine.kv.layout.blocks_for(length + 1)
        table, blocks = tuple(blocks[:count]), blocks[count:]
        tokens = [drawn.randrange(engine.spec.vocab_size) for _ in range(length + 1)]
        engine.execute(StepPlan(0, (Slice(str(row), tuple(tokens[:length]), 0, table, None),)))
        slices.append(Slice(str(row), (tokens[length],), length, table, Draw(GREEDY, length + 1, length, ())))
    return tuple(slices)


@torch.inference_mode()
def _unpadded(engine: Engine, slices: tuple[Slice, ...]) -> Tensor:
    hidden = engine.decoder.forward(engine._step_tensors(slices, engine._inputs_of(slices, None), None))
    assert hidden is not None
    return engine.decoder.logits(hidden).clone()


@torch.inference_mode()
def _padded(engine: Engine, inputs: DecodeInputs, slices: tuple[Slice, ...]) -> Tensor:
    size = inputs.size_for(len(slices))
    inputs.fill(engine._inputs_of(slices, None), size)
    hidden = engine.decoder.forward(inputs.step(size))
    assert hidden is not None
    assert hidden.shape[0] == size
    return engine.decoder.logits(hidden)[: len(slices)].clone()


def test_a_padded_step_is_the_step(engine: Engine) -> None:
    """A step of nine, then smaller ones in the same tensors: logits as without padding, and no KV but the spare blocks'
    that is not the same, however poisoned what lies there was."""
    first_spare = NUM_BLOCKS - spare_blocks(engine.kv.layout)
    max_context_tokens = engine.spec.max_context_tokens
    inputs = DecodeInputs(engine.kv.layout, first_spare, 9, max_context_tokens, torch.device("cpu"))
    everyone = _prefilled(engine, [5, 1, 8, 3, 12, 4, 2, 7, 11], first_spare)
    before = engine.kv.tensor.clone()
    tolerance = 0.0 if shared_library() is not None else 1e-5 if engine.dtype.value == "float32" else 0.2
    for slices in (everyone, everyone[2:7], everyone[4:5], everyone[:3]):
        engine.kv.tensor.copy_(before)
        expected = _unpadded(engine, slices)
        expected_kv = engine.kv.tensor[:first_spare].clone()
        engine.kv.tensor.copy_(before)
        engine.kv.tensor[first_spare:] = 127 if engine.kv.tensor.dtype == torch.int8 else float("nan")
        found = _padded(engine, inputs, slices)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        same = engine.kv.tensor[:first_spare].view(torch.uint8) == expected_kv.view(torch.uint8)
        assert same.all() if tolerance == 0.0 else same.float().mean() > 0.9


def test_padding_rows_write_apart(engine: Engine) -> None:
    first_spare = NUM_BLOCKS - spare_blocks(engine.kv.layout)
    inputs = DecodeInputs(engine.kv.layout, first_spare, 16, engine.spec.max_context_tokens, torch.device("cpu"))
    block_tokens = engine.kv.layout.block_tokens
    slices = tuple(DECODE._replace(start=0, block_table=(row,)) for row in range(9))
    inputs.fill(engine._inputs_of(slices, None), 16)
    slots = inputs.step(16).slots
    assert inputs.step(16).block_tables[:, 0].tolist() == [*range(9), *[first_spare] * 7]
    assert inputs.step(16).context_lens.tolist() == [1] * 16
    assert slots[:9].tolist() == [row * block_tokens for row in range(9)]
    assert len(set(slots[9:].tolist())) == 7
    assert slots[9:].min() >= first_spare * block_tokens
    assert slots[9:].max() < NUM_BLOCKS * block_tokens


def test_a_greatest_that_is_known_is_what_is_drawn() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    draws = [Draw(GREEDY, 4, 2, ()), Draw(GREEDY, 5, 2, ())]
    known = (torch.tensor([2, 0]), torch.tensor([1.0, float("nan")]))
    assert [each.token_id for each in draw(logits, draws)] == [1, 0]
    assert [each.token_id for each in draw(logits, draws, None, known)] == [2, NO_TOKEN]


def test_padding_counts_for_no_expert(tmp_path: Path) -> None:
    engine = Engine(open_model(make_model(tmp_path, "mixtral")), EngineOptions(dtype="float32", device="cpu"), 20)
    first_spare = 20 - spare_blocks(engine.kv.layout)
    inputs = DecodeInputs(engine.kv.layout, first_spare, 8, engine.spec.max_context_tokens, torch.device("cpu"))
    slices = _prefilled(engine, [3, 7, 5, 2, 9], first_spare)
    experts = engine.decoder.experts
    assert experts is not None
    experts.loads.zero_()
    expected_logits = _unpadded(engine, slices)
    expected = experts.loads.clone()
    experts.loads.zero_()
    torch.testing.assert_close(_padded(engine, inputs, slices), expected_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(experts.loads, expected)
    assert experts.loads.sum() == 5 * 2 * engine.spec.num_layers


def test_a_capture_that_fails_leaves_steps_as_they_are(tmp_path: Path) -> None:
    """Its reason is there, graphs of before are gone, and a later capture that does not fail is used."""
    engine = Engine(open_model(make_llama(tmp_path, SHAPES[0])), EngineOptions(device="cpu"), 20)
    engine._graph_rows = 4
    engine.place_kv(20)
    engine.kv.tensor.zero_()
    tried: list[str] = []

    def refusing(work: Callable[[], None]) -> Callable[[], None]:
        tried.append("")
        if len(tried) == 5:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return work

    engine._captured = CapturedDecodes(engine.decoder, 4, torch.device("cpu"), lambda: refusing)
    engine._captured.capture()
    assert engine._captured.takes((DECODE,))
    engine._captured.capture()
    assert engine.graph_failure == "2 rows: RuntimeError: operation not permitted when stream is capturing"
    assert not engine._captured.takes((DECODE,))
    assert len(tried) == 5
    engine._captured.capture()
    assert engine.graph_failure == ""
    assert engine._captured.takes((DECODE,))
    assert engine.execute(StepPlan(0, (DECODE,))).drawn[0][0].token_id >= 0
