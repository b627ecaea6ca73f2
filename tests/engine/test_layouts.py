"""Layouts over processes against transformers in float32, to 1e-4 relative (P1).

    python -m pytest tests/engine/test_layouts.py --whole-grid     every family × {tp 1,2,4} × {pp 1,2} × {ep 1,2,4},
                                                                   and × {tp 1,2} × {pp 1,2} with dp2 and stage

Without it COVERING: every family at tp2-pp2, and each further layout with one or two families.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from ranks import ranked_engine
from stepper import Stepper, worst_difference
from tiny_llama import load_reference, reference_of
from tiny_models import MODELS, MOE_MODELS, make_model

from spec.errors import InvalidConfiguration
from spec.hf_config import model_from_hf
from spec.layout import ParallelLayout
from spec.shard import check_layout

TOLERANCE = 1e-4


def grid() -> list[tuple[str, ParallelLayout]]:
    """ep cuts the ranks of a stage; an ep beyond tp takes dp groups. Every family once more where the groups of a stage
    share each MLP."""
    found = []
    for name, tp, pp, ep in itertools.product(MODELS, (1, 2, 4), (1, 2), (1, 2, 4)):
        if (ep == 1 or name in MOE_MODELS) and not (name == "llama-odd" and tp == 4):  # four ranks for three KV heads
            found.append((name, ParallelLayout(tp=tp, pp=pp, dp=max(1, ep // tp), ep=ep)))
    for name, tp, pp in itertools.product(MODELS, (1, 2), (1, 2)):
        found.append((name, ParallelLayout(tp=tp, pp=pp, dp=2, ep=2 * tp if name in MOE_MODELS else 1, mlp="stage")))
    return found


COVERING = [
    *((name, ParallelLayout(tp=2, pp=2)) for name in MODELS),
    ("llama3", ParallelLayout(tp=4)),
    ("llama-odd", ParallelLayout(tp=3)),
    ("llama3", ParallelLayout(pp=4)),
    ("llama3.2-tied", ParallelLayout(tp=4)),  # more ranks than KV heads
    ("gemma2", ParallelLayout(tp=4)),
    ("phi3-longrope", ParallelLayout(tp=4)),
    ("qwen3", ParallelLayout(tp=2, dp=2)),
    ("qwen2", ParallelLayout(pp=2, tp=2, dp=2)),
    ("mixtral", ParallelLayout(tp=4, ep=4)),
    ("mixtral", ParallelLayout(dp=2, ep=2)),
    ("gpt-moe", ParallelLayout(tp=2, dp=2, ep=4)),
    ("gpt-moe", ParallelLayout(pp=2, tp=2, dp=2, ep=4)),
    ("qwen3-moe", ParallelLayout(tp=2, dp=2, ep=2)),
    ("qwen3-moe", ParallelLayout(dp=4, ep=4)),
    ("deepseek-v3", ParallelLayout(dp=4, ep=4)),
    ("deepseek-v3", ParallelLayout(tp=2, pp=2, ep=2)),
    ("deepseek-v2-lite", ParallelLayout(tp=4, ep=2)),
    ("gpt-oss", ParallelLayout(tp=2, dp=2, ep=4)),
    ("gpt-oss", ParallelLayout(tp=4, ep=2)),
    ("qwen3", ParallelLayout(dp=2, mlp="stage")),
    ("llama-odd", ParallelLayout(dp=3, mlp="stage")),
    ("gemma2", ParallelLayout(tp=2, dp=2, mlp="stage")),
    ("llama3.2-tied", ParallelLayout(pp=2, tp=2, dp=2, mlp="stage")),
    ("deepseek-v3", ParallelLayout(tp=2, dp=2, ep=4, mlp="stage")),
    ("gpt-oss", ParallelLayout(dp=2, mlp="stage")),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = grid() if metafunc.config.getoption("--whole-grid") else COVERING
        metafunc.parametrize("case", cases, ids=[f"{name}-{layout}" for name, layout in cases])


def prompt(length: int, vocab: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(length)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, object]]:
    class OnDemand(dict[str, tuple[Path, object]]):
        def __missing__(self, name: str) -> tuple[Path, object]:
            folder = make_model(tmp_path_factory.mktemp(name), name)
            self[name] = folder, load_reference(folder)
            return self[name]

    return OnDemand()


def compare(
    folder: Path, oracle: object, layout: ParallelLayout, copies: int = 0, prompts: bool = True, **options: object
) -> list[int]:
    """Sequences of several lengths in steps that mix chunks and single tokens, on groups drawn from their names. With
    `copies` experts are placed anew after every third step. `prompts`: see Stepper. Returns how
    many steps each rank replayed."""
    placed, steps = [], 0
    with ranked_engine(folder, layout, **options) as engine:
        generator = random.Random(1)
        stepper = Stepper(engine, prompts=prompts)
        running = [stepper.add(f"s{i}", prompt(36 + 5 * i, engine.spec.vocab_size, i), 33 + 2 * i) for i in range(4)]
        while pending := [each for each in running if each.computed < len(each.token_ids)]:
            taken = generator.sample(pending, generator.randrange(1, len(pending) + 1))
            stepper.step([(each, max(1, min(13, each.num_prompt - each.computed))) for each in taken])
            steps += 1
            if copies and steps % 3 == 0:
                found = engine.replicate_experts(copies)
                assert found == found[:1] * layout.num_ranks
                placed.append(found[0])
        replays = engine.replays()
    assert all(1.0 <= after <= before for before, after in placed)
    assert any(after < before for before, after in placed) == bool(copies)
    for each in running:
        rows = sorted(each.logprobs)
        assert len(rows) == len(each.token_ids) if prompts else rows[-1] == len(each.token_ids) - 1
        found = np.stack([each.logprobs[row] for row in rows])
        assert worst_difference(found, reference_of(oracle, each.token_ids)[rows]) < TOLERANCE, each.name
    return replays


@pytest.mark.parametrize(
    ("name", "layout", "copies"),
    [
        ("llama3", ParallelLayout(tp=2), 0),
        ("qwen3-moe", ParallelLayout(pp=2), 0),
        ("gpt-oss", ParallelLayout(tp=2, pp=2, ep=2), 2),
        ("deepseek-v3", ParallelLayout(tp=2, ep=2), 0),
    ],
)
def test_decode_steps_that_are_replayed(
    name: str, layout: ParallelLayout, copies: int, models: dict[str, tuple[Path, object]]
) -> None:
    """Padded, and in tensors that stay, as a GPU replays them; experts are placed anew between them."""
    folder, oracle = models[name]
    replays = compare(folder, oracle, layout, copies, block_tokens=7, replayed_rows=3)
    assert min(replays) == max(replays) > 3


def test_logits(case: tuple[str, ParallelLayout], models: dict[str, tuple[Path, object]]) -> None:
    name, layout = case
    folder, oracle = models[name]
    compare(folder, oracle, layout, block_tokens=7)


@pytest.mark.parametrize("tp", [2, 4])
def test_weight_gathered(tp: int, models: dict[str, tuple[Path, object]]) -> None:
    folder, oracle = models["qwen3"]
    compare(folder, oracle, ParallelLayout(tp=tp, mlp="gathered", gathered_tokens=3))


def test_rows_that_nobody_wants_end_in_the_last_layer(tmp_path: Path) -> None:
    """In some steps all of a group's; and what is cut over several groups has its bias added once."""
    folder = make_model(tmp_path / "biased", "llama3", attention_bias=True, mlp_bias=True)
    compare(folder, load_reference(folder), ParallelLayout(tp=2, dp=2, mlp="stage"), prompts=False)


def test_replicated_experts(models: dict[str, tuple[Path, object]]) -> None:
    folder, oracle = models["gpt-moe"]
    compare(folder, oracle, ParallelLayout(dp=2, ep=2), replicas={0: {0: 2, 5: 2}, 3: {1: 2}})
    compare(folder, oracle, ParallelLayout(tp=2, ep=2), replicas={1: {3: 2}, 2: {3: 2}})


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt-moe", ParallelLayout(dp=2, ep=2)),
        ("mixtral", ParallelLayout(tp=2, ep=2)),
        ("gpt-oss", ParallelLayout(tp=2, pp=2, ep=2)),
    ],
)
def test_experts_are_placed_by_load_between_steps(
    name: str, layout: ParallelLayout, models: dict[str, tuple[Path, object]]
) -> None:
    folder, oracle = models[name]
    compare(folder, oracle, layout, copies=2, block_tokens=7)


@pytest.mark.parametrize(
    ("name", "layout", "why"),
    [
        ("llama3", ParallelLayout(pp=5), "pp 5 exceeds the model's 4 layers"),
        ("llama3", ParallelLayout(tp=16), "tp 16 exceeds the model's 8 heads"),
        ("llama3", ParallelLayout(tp=6), "no multiple"),
        ("llama3", ParallelLayout(tp=2, ep=2), "this model has none"),
        ("mixtral", ParallelLayout(dp=8, ep=8), "ep 8 exceeds the model's 4 experts"),
    ],
)
def test_what_does_not_fit_is_said(name: str, layout: ParallelLayout, why: str) -> None:
    with pytest.raises(InvalidConfiguration, match=why):
        check_layout(model_from_hf(MODELS[name]().to_dict()), layout)


@pytest.mark.parametrize(
    "text", ["tp2tp2", "tp２", "tp", "tp0", "xp2", "", "tp2-tp4", "tp3-ep2", "tp2-stage", "dp2-stage-gathered"]
)
def test_a_layout_that_is_none(text: str) -> None:
    with pytest.raises(InvalidConfiguration):
        ParallelLayout.parse(text)


def test_a_layout_reads_what_it_writes() -> None:
    for tp, pp, dp, ep in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2)):
        if tp * dp % ep == 0:
            layout = ParallelLayout(tp, pp, dp, ep)
            assert ParallelLayout.parse(str(layout)) == layout
            shared = ParallelLayout(tp, pp, 3, mlp="stage")
            assert ParallelLayout.parse(str(shared)) == shared
    gathered = ParallelLayout(tp=8, mlp="gathered")
    assert ParallelLayout.parse(str(gathered)) == gathered
