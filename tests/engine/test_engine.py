"""What an Engine promises beside its logits: rows that do not see each other, the layer hook, memory, options."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stepper import Stepper, rows_of, worst_difference
from tiny_llama import SHAPES, Shape, load_reference, make_llama, reference_of

from engine.engine import Engine, EngineOptions, kv_layout_for
from engine.kv_memory import KVMemory
from engine.layer_hook import LayerHook
from engine.model_files import open_model
from kernels.cpu.library import shared_library
from scheduler.plan import Draw, Slice, StepPlan, StepResult
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, OutOfBlocks
from spec.layout import KVLayout
from spec.sampling import SamplingParams

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=12, block_tokens=4, dtype=Dtype.FLOAT32)
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), SHAPES[0])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Engine:
    return Engine(open_model(folder), EngineOptions(dtype=request.param, device="cpu", block_tokens=4), 300)


def test_a_sequence_is_the_same_in_company(engine: Engine) -> None:
    """Decodes beside chunks and other decodes: to the last bit, which is what the compiled kernels promise. torch's
    own products, which serve where no compiler is, round differently for other numbers of rows."""
    stepper = Stepper(engine)
    token_ids = [(7 * i + 3) % 431 for i in range(60)]
    alone = stepper.run(token_ids)
    many = [stepper.add(f"s{i}", token_ids[: 20 + i], num_prompt=8 + i) for i in range(12)]
    whole = stepper.add("whole", token_ids)
    stepper.step([(each, 8 + i) for i, each in enumerate(many)] + [(whole, 31)])
    for _ in range(12):
        stepper.step([(each, 1) for each in many])
    stepper.step([(whole, 29)])
    tolerance = 0.0 if shared_library() is not None else 1e-5 if engine.dtype is Dtype.FLOAT32 else 0.2
    for each in (*many, whole):
        found = rows_of(each)
        np.testing.assert_allclose(found, alone[: len(found)], rtol=tolerance, atol=tolerance)


def test_what_lay_in_the_blocks_before_does_not_show(engine: Engine) -> None:
    token_ids = list(range(50, 83))
    clean = Stepper(engine, seed=1).run(token_ids, 7)
    engine.kv.tensor.fill_(float("nan"))
    found = Stepper(engine, seed=2).run(token_ids, 7)
    np.testing.assert_array_equal(found, clean)
    engine.kv.tensor.zero_()


def test_only_the_blocks_of_the_plan_are_written(engine: Engine) -> None:
    engine.kv.tensor.fill_(-3.5)
    piece = Slice("a", tuple(range(9, 19)), 0, (7, 2, 11), Draw(GREEDY, 10, 10, ()))
    engine.execute(StepPlan(0, (piece,)))
    written = (engine.kv.tensor != -3.5).any(dim=-1)  # [blocks, layers, 2, heads, tokens]
    assert written[[7, 2]].all()
    assert written[11, :, :, :, :2].all()
    written[[7, 2]] = False
    written[11, :, :, :, :2] = False
    assert not written.any()
    engine.kv.tensor.zero_()


def test_layers_are_told_when_their_kv_is_there(engine: Engine) -> None:
    engine.kv.tensor.zero_()
    seen: list[tuple[int, list[bool]]] = []

    def written(end: int) -> None:
        seen.append((end, engine.kv.tensor[5].flatten(1).bool().all(dim=1).tolist()))

    plan = StepPlan(0, (Slice("a", (3, 4, 5, 6), 0, (5,), None),))
    each = [(1, [True, False, False]), (2, [True, True, False]), (3, [True, True, True])]
    for recorded in (engine.decoder.recorded, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.decoder, "recorded", recorded)
            for ends in ((1, 2, 3), (2, 3), (3,), (2,), ()):
                engine.kv.tensor.zero_()
                seen.clear()
                engine.execute(plan, LayerHook(ends, written))
                assert seen == [each[end - 1] for end in ends]


def test_an_exception_of_the_hook_ends_the_step(engine: Engine) -> None:
    def written(end: int) -> None:
        raise OutOfBlocks("no")

    with pytest.raises(OutOfBlocks):
        engine.execute(StepPlan(0, (Slice("a", (3,), 0, (0,), None),)), LayerHook((2,), written))


def test_results_stand_where_their_slices_stand(engine: Engine) -> None:
    quiet = Slice("quiet", (3, 4), 0, (0,), None)
    scored = Slice("scored", (5, 6, 7), 0, (1,), None, 2, (6, 7, 8))
    drawing = Slice("drawing", (9,), 0, (2,), Draw(GREEDY, 1, 1, ()))
    both = Slice("both", (10, 11, 12), 0, (3,), Draw(GREEDY, 3, 3, ()), 0, (11, 12))
    forward = engine.execute(StepPlan(0, (quiet, scored, drawing, both)))
    backward = engine.execute(StepPlan(1, (both, drawing, scored, quiet)))
    assert [len(each) for each in forward.drawn] == [0, 0, 1, 1]
    assert [len(each) for each in forward.prompt_logprobs] == [0, 3, 0, 2]
    assert [len(row.top) for row in forward.prompt_logprobs[1] + forward.prompt_logprobs[3]] == [2, 2, 2, 0, 0]
    assert [each and each[0].token_id for each in backward.drawn] == [
        each and each[0].token_id for each in forward.drawn[::-1]
    ]
    assert engine.execute(StepPlan(2, (quiet,))) == StepResult(((),), ((),))
    assert engine.execute(StepPlan(3, ())) == StepResult((), ())


def test_prompt_logprobs_of_more_rows_than_are_held_at_once(engine: Engine) -> None:
    token_ids = tuple((5 * i + 1) % 431 for i in range(150))
    table = tuple(range(100, 138))
    asked = Slice("a", token_ids, 0, table, None, 0, token_ids[1:])
    (found,) = engine.execute(StepPlan(0, (asked,))).prompt_logprobs
    expected = Stepper(engine).run(token_ids)
    tolerance = 1e-5 if engine.dtype is Dtype.FLOAT32 else 0.2
    np.testing.assert_allclose([row.logprob for row in found], expected[np.arange(149), token_ids[1:]], rtol=tolerance)


def test_a_plan_outside_the_memory_is_our_own_fault(engine: Engine) -> None:
    for piece in (
        Slice("block", (3,), 0, (300,), None),
        Slice("context", (3,), 512, tuple(range(129)), None),
        Slice("short table", (3, 4, 5, 6, 7), 0, (1,), None),
        Slice("token", (431,), 0, (1,), None),
        Slice("negative token", (-1,), 0, (1,), None),
        Slice("empty", (), 0, (1,), None),
    ):
        with pytest.raises(AssertionError):
            engine.execute(StepPlan(0, (piece,)))


def test_kv_memory_lies_in_the_buffer_that_was_given(folder: Path) -> None:
    files, options = open_model(folder), EngineOptions(device="cpu", block_tokens=4)
    layout = kv_layout_for(files.spec, options)
    assert layout == LAYOUT
    memory = bytearray(10 * layout.block_bytes + 100)
    engine = Engine(files, options, 10, memoryview(memory))
    engine.execute(StepPlan(0, (Slice("a", (3, 4, 5), 0, (9,), None),)))
    values = np.frombuffer(memory, np.float32, count=10 * layout.block_bytes // 4).reshape(layout.shape(10))
    assert np.array_equal(values, engine.kv.tensor.numpy())
    assert values[9, :, :, :, :3].all()
    assert not values[9, :, :, :, 3].any()
    assert not any(memory[10 * layout.block_bytes :])
    keys, items = engine.kv.layer(2)
    assert keys.shape == items.shape == (10, 2, 4, 12)
    assert np.array_equal(keys.numpy(), values[:, 2, 0])
    assert np.array_equal(items.numpy(), values[:, 2, 1])


def test_a_buffer_that_does_not_do_is_refused() -> None:
    cpu = torch.device("cpu")
    for buffer in (memoryview(bytearray(3 * LAYOUT.block_bytes - 1)), memoryview(bytes(3 * LAYOUT.block_bytes))):
        with pytest.raises(InvalidConfiguration, match="writable, contiguous"):
            KVMemory(LAYOUT, 3, cpu, buffer)
    with pytest.raises(InvalidConfiguration, match="at least 1"):
        KVMemory(LAYOUT, 0, cpu)
    with pytest.raises(InvalidConfiguration, match="host buffer"):
        KVMemory(LAYOUT, 1, torch.device("cuda"), memoryview(bytearray(LAYOUT.block_bytes)))
    with pytest.raises(OutOfBlocks, match="cannot allocate"):
        KVMemory(LAYOUT, 1 << 50, cpu)


def test_kv_memory_that_is_placed_later_is_the_engine_s(folder: Path) -> None:
    """An engine that was made with one block draws in the memory that it is given what another draws in its own."""
    options = EngineOptions(device="cpu", block_tokens=4)
    late, other = Engine(open_model(folder), options, 1), Engine(open_model(folder), options, 9)
    buffer = memoryview(bytearray(9 * late.kv.layout.block_bytes))
    late.place_kv(9, buffer)
    late.warm_up()
    other.warm_up()
    table = (8, 3, 5, 1, 7)
    draw = Draw(SamplingParams(temperature=0.0, logprobs=3), 17, 17, ())
    plan = StepPlan(0, (Slice("a", tuple(range(3, 20)), 0, table, draw),))
    assert late.execute(plan) == other.execute(plan)
    own = torch.frombuffer(buffer, dtype=late.kv.tensor.dtype).view(late.kv.tensor.shape)
    assert torch.equal(own[list(table[:4])], other.kv.tensor[list(table[:4])])


def test_progress_rises_to_one(folder: Path) -> None:
    heard: list[float] = []
    Engine(open_model(folder), EngineOptions(device="cpu"), 4, progress=heard.append)
    assert heard == sorted(heard)
    assert heard[0] > 0.0
    assert heard[-1] == 1.0


def test_warm_up_fits_the_smallest_memory(folder: Path) -> None:
    for num_blocks, block_tokens in ((1, 2), (1, 16), (3, 16), (50, 16)):
        Engine(open_model(folder), EngineOptions(device="cpu", block_tokens=block_tokens), num_blocks).warm_up()


def test_dtypes(folder: Path, tmp_path: Path) -> None:
    spec = open_model(folder).spec
    assert EngineOptions().dtype_for(spec) is Dtype.FLOAT32
    assert EngineOptions(dtype="bfloat16").dtype_for(spec) is Dtype.BFLOAT16
    load_reference(folder).half().save_pretrained(tmp_path)
    assert EngineOptions().dtype_for(open_model(tmp_path).spec) is Dtype.BFLOAT16
    with pytest.raises(InvalidConfiguration, match="int3"):
        EngineOptions(dtype="int3").dtype_for(spec)


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(InvalidConfiguration, match=device):
        EngineOptions(device=device).torch_device()


@pytest.mark.parametrize("options", [EngineOptions(threads=0), EngineOptions(block_tokens=0)])
def test_numbers_out_of_range(folder: Path, options: EngineOptions) -> None:
    with pytest.raises(InvalidConfiguration, match="at least 1, is 0"):
        Engine(open_model(folder), options, 4)


def test_weights_are_held_once(tmp_path: Path) -> None:
    """Tied embeddings are one object, and nothing of the files stays mapped."""
    files = open_model(make_llama(tmp_path, Shape("tied")))
    engine = Engine(files, EngineOptions(device="cpu"), 4)
    assert engine.decoder.weights.head is engine.decoder.weights.embedding
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(InvalidConfiguration, match="'int3' is none; known are auto, none, int8"):
        EngineOptions(quantisation="int3")  # type: ignore[arg-type]


def test_no_table_is_longer_than_the_context_that_is_asked_for(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model", SHAPES[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**12}))
    files = open_model(folder)
    with pytest.raises(InvalidConfiguration, match=r"engine\.max_context_tokens"):
        Engine(files, EngineOptions(device="cpu"), 8)
    engine = Engine(files, EngineOptions(device="cpu", max_context_tokens=77), 8)
    assert engine.spec.max_context_tokens == 77
    assert [tuple(cos.shape) for cos, _ in engine.decoder.rope_tables] == [(77, 6)]
    token_ids = [(7 * i + 3) % 431 for i in range(77)]
    assert worst_difference(Stepper(engine).run(token_ids), reference_of(load_reference(folder), token_ids)) < 1e-4


def test_a_context_beyond_the_models_own_is_the_models_own(folder: Path) -> None:
    spec = open_model(folder).spec
    assert [EngineOptions(max_context_tokens=asked).context_of(spec) for asked in (None, 5, 9999)] == [512, 5, 512]
