"""A step's inputs on the host: what each position's are by definition, made at once or in two parts."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_llama import SHAPES, make_llama

from engine.engine import Engine, EngineOptions
from engine.inputs import HostInputs
from engine.model_files import open_model
from scheduler.plan import NO_TOKEN, Draw, Slice, StepPlan
from spec.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, logprobs=3)
NUM_BLOCKS, VOCAB, CONTEXT = 200, 431, 512


def any_slices(rng: random.Random, block_tokens: int, *, decodes: bool) -> list[Slice]:
    slices = []
    for number in range(rng.randint(1, 9)):
        start = rng.randint(0, 40)
        num_tokens = 1 if decodes else rng.randint(1, 7)
        guesses = 0 if decodes else rng.choice([0, 0, 2])
        tokens = [rng.randrange(VOCAB) for _ in range(num_tokens + guesses)]
        width = -(-(start + len(tokens)) // block_tokens) + rng.choice([0, 0, 1])
        table = tuple(rng.randrange(NUM_BLOCKS) for _ in range(width))
        known, guessed = tuple(tokens[:num_tokens]), tuple(tokens[num_tokens:])
        slices.append(Slice(str(number), known, start, table, None, guessed_token_ids=guessed))
    return slices


def as_ahead(piece: Slice, block_tokens: int) -> Slice:
    known_blocks = -(-piece.start // block_tokens)
    return piece._replace(token_ids=(NO_TOKEN,), block_table=piece.block_table[:known_blocks])


def check(host: HostInputs, slices: list[Slice], block_tokens: int) -> None:
    host.complete(slices, NUM_BLOCKS, VOCAB, CONTEXT)
    row = 0
    for index, piece in enumerate(slices):
        assert host.query_starts[index] == row
        for position, token_id in enumerate((*piece.token_ids, *piece.guessed_token_ids), piece.start):
            block = piece.block_table[position // block_tokens]
            assert host.block_tables[index, position // block_tokens] == block
            found = host.token_ids[row], host.positions[row], host.slots[row], host.slice_of[row]
            assert found == (token_id, position, block * block_tokens + position % block_tokens, index)
            row += 1
        assert host.context_lens[index] == position + 1
        width = position // block_tokens + 1
        assert host.block_tables[index, :width].tolist() == list(piece.block_table[:width])
        assert not host.block_tables[index, width:].any()
    assert host.query_starts[-1] == host.num_tokens == row


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_inputs_by_definition(block_tokens: int) -> None:
    for seed in range(40):
        slices = any_slices(random.Random(seed), block_tokens, decodes=False)
        check(HostInputs(slices, block_tokens), slices, block_tokens)


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_inputs_in_two_parts(block_tokens: int) -> None:
    """Tokens and new blocks come last; a new block is one in `block_tokens`."""
    num_lacking = 0
    for seed in range(40):
        slices = any_slices(random.Random(seed), block_tokens, decodes=True)
        ahead = [as_ahead(piece, block_tokens) for piece in slices]
        num_lacking += sum(len(piece.block_table) * block_tokens == piece.start for piece in ahead)
        check(HostInputs(ahead, block_tokens), slices, block_tokens)
    assert num_lacking > 0


def test_a_table_that_is_too_short_is_no_plan() -> None:
    piece = Slice("a", (7,), 6, (1, 2), None)
    with pytest.raises(AssertionError):
        HostInputs([piece], 3).complete([piece], NUM_BLOCKS, VOCAB, CONTEXT)
    with pytest.raises(AssertionError):
        HostInputs([piece._replace(block_table=(1,))], 3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = make_llama(tmp_path_factory.mktemp("llama"), SHAPES[0])
    return Engine(open_model(folder), EngineOptions(device="cpu", block_tokens=4), 40)


def decode(name: str, token_id: int, start: int, table: tuple[int, ...]) -> Slice:
    return Slice(name, (token_id,), start, table, Draw(GREEDY, start + 1, 3, ()))


def test_what_was_prepared_is_used_by_the_plan_that_came_of_it_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan made ahead gives what it gives without; another one behind the same preparation does not see it."""
    prompts = {"a": (5, 6, 7, 8), "b": (9, 10, 11, 12, 13)}
    tables = {"a": (3, 9), "b": (7, 5)}
    engine.kv.tensor.zero_()
    engine.execute(StepPlan(0, tuple(Slice(name, prompts[name], 0, tables[name], None) for name in prompts)))
    both = (decode("a", 20, 4, tables["a"]), decode("b", 21, 5, tables["b"]))
    ahead = tuple(as_ahead(piece, 4) for piece in both)
    assert ahead[0].block_table == (3,)
    expected = [engine.execute(StepPlan(1, both[:count])) for count in (1, 2)]
    kv = engine.kv.tensor.clone()

    made: list[object] = []
    monkeypatch.setattr("engine.engine.HostInputs", lambda *given: made.append(given[0]) or HostInputs(*given))

    def steps(plan: StepPlan) -> list[object]:
        """What inputs were made of, preparation and step."""
        made.clear()
        engine.prepare(ahead)
        assert engine.execute(plan) == expected[len(plan.slices) - 1]
        assert torch.equal(engine.kv.tensor, kv)
        return list(made)

    assert steps(StepPlan(1, both, ahead)) == [ahead]
    assert steps(StepPlan(1, both[:1])) == [ahead, both[:1]]  # dropped: "b" has ended
    assert steps(StepPlan(1, both, tuple(each for each in ahead))) == [ahead, both]  # equal, but not these
    made.clear()
    assert engine.execute(StepPlan(1, both, ahead)) == expected[1]
    assert made == [both]  # what was prepared before a dropped plan is gone with it
