"""Trace files and the prompts that are made of them."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest

from legato.bench import traces
from legato.bench.arrivals import Arrival
from legato.bench.corpus import PROMPTS
from legato.bench.lengths import parse_lengths
from legato.bench.prompts import PromptBook, TokenTexts, read_prompts
from legato.bench.settings import Settings, plan
from legato.errors import InvalidParameter
from legato.types import Model

MOONCAKE = [
    {"timestamp": 0, "input_length": 1030, "output_length": 50, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 1500, "output_length": 9, "hash_ids": [0, 1, 3]},
    {"timestamp": 3000, "input_length": 600, "output_length": 20, "hash_ids": [0, 4]},
    {"timestamp": 4500, "input_length": 513, "output_length": 0, "hash_ids": [5, 6]},
]
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.4799600,3180,8
2023-11-16 18:18:03.9799600,0,27
"""


@pytest.fixture
def mooncake(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MOONCAKE))
    return path


@pytest.fixture
def azure(tmp_path):
    path = tmp_path / "azure.csv.gz"
    path.write_bytes(gzip.compress(AZURE.encode()))
    return path


def test_mooncake(mooncake):
    assert traces.read_trace(mooncake) == [
        Arrival(0.0, 1030, 50, (0, 1, 2)),
        Arrival(0.0, 1500, 9, (0, 1, 3)),
        Arrival(3.0, 600, 20, (0, 4)),
        Arrival(4.5, 513, 1, (5, 6)),
    ]


def test_azure_gzipped_at_half_speed(azure):
    assert traces.read_trace(azure, speed=0.5) == [
        Arrival(0.0, 4808, 10),
        Arrival(pytest.approx(1.0), 3180, 8),
        Arrival(pytest.approx(120.0), 1, 27),
    ]


def test_azure_of_2024_has_zones_and_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "azure.csv"
    rows = ["\ufeffTIMESTAMP,ContextTokens,GeneratedTokens", "2024-05-10 00:00:01.5+00:00,7,9"]
    path.write_text("\r\n".join([*rows, "2024-05-10 02:00:00+02:00,5,6"]))
    assert traces.read_trace(path) == [Arrival(0.0, 5, 6), Arrival(pytest.approx(1.5), 7, 9)], "in order of time"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "neither"),
        ("a,b,c\n1,2,3\n", "neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,many,3\n", ":2: .*many"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4\n", ":2: "),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,4,-1\n", ":2: .*negative"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 6}\n{"timestamp": 1}\n', ":2: input_length is missing"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 6}\n[]\n', ":2: "),
        ('{"timestamp": 0, "input_length": 5, "output_length": 6}\n{"time', ":2: "),
        ('{"timestamp": 0, "input_length": 1025, "output_length": 6, "hash_ids": [0, 1]}\n', ":1: 2 hash_ids do not"),
        ('{"timestamp": Infinity, "input_length": 5, "output_length": 6}\n', ":1: .*finite"),
    ],
)
def test_a_broken_trace_is_named_with_its_line(content, says, tmp_path):
    path = tmp_path / "trace.txt"
    path.write_text(content)
    with pytest.raises(InvalidParameter, match=says):
        traces.read_trace(path)


def test_files_that_cannot_be_read(tmp_path, azure):
    (tmp_path / "cut.gz").write_bytes(azure.read_bytes()[:-20])
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "cut.gz", "binary"):
        with pytest.raises(InvalidParameter, match=f"{name} cannot be read"):
            traces.read_trace(tmp_path / name)


@pytest.mark.parametrize("context_tokens", [33, 100, 511, 1509, 99_999])
def test_the_fitting_scale_fits_and_is_the_largest(context_tokens, mooncake):
    arrivals = traces.read_trace(mooncake)
    factor = traces.fitting_scale(arrivals, context_tokens)
    longest = max(one.prompt_tokens + one.output_tokens for one in traces.scaled(arrivals, factor))
    assert longest <= context_tokens
    assert longest >= min(1509, context_tokens - 2)
    assert factor <= 1


def test_a_trace_that_does_not_fit_says_what_to_do(mooncake):
    with pytest.raises(InvalidParameter, match=r"2 of 4 requests .* 700 tokens; --scale-lengths fit"):
        plan(Settings(trace=mooncake), 700)
    planned = plan(Settings(trace=mooncake, scale_lengths="fit", requests=3, warmup=2), 700)
    assert planned.total == len(list(planned.arrivals)) == 3
    assert [one.prefix_ids for one in planned.warmup] == [(), ()], "a warm-up leaves no prefix behind"
    assert plan(Settings(trace=mooncake, duration_s=3.5), 2000).total == 3
    assert plan(Settings(trace=mooncake, duration_s=3.5, speed=2.0), 2000).total == 4


def test_answers_of_a_trace_can_be_given(mooncake):
    given = parse_lengths("90-100", "--output-tokens")
    due = list(plan(Settings(trace=mooncake, scale_lengths="fit", output_tokens=given), 400).arrivals)
    assert all(90 <= one.output_tokens <= 100 for one in due)
    longest = max(one.prompt_tokens + one.output_tokens for one in due)
    assert 385 <= longest <= 400
    shares = [one.prompt_tokens / was["input_length"] for one, was in zip(due, MOONCAKE, strict=True)]
    assert shares == pytest.approx([shares[0]] * 4, rel=0.01)
    with pytest.raises(InvalidParameter, match=r"4 of 4 .* lower --output-tokens"):
        plan(Settings(trace=mooncake, scale_lengths="fit", output_tokens=given), 80)


class Bytes:
    """A tokenizer: bytes, behind a begin-of-sequence token where there is one."""

    def __init__(self, start=()):
        self.start = list(start)

    async def tokenize(self, text, model=""):
        return [*self.start, *text.encode()]


async def book(seed=0, nonce=0, start=(), block_tokens=512, texts=PROMPTS, chat=False):
    tokens = await TokenTexts.ask(Bytes(start), "m", texts, seed)
    return PromptBook(Model("m", "r", 9999, 300, chat), tuple(texts), tokens, seed, nonce, block_tokens)


@pytest.mark.parametrize("start", [(), (257,), (257, 258)])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 511, 3000])
async def test_prompts_have_the_length_asked_for_and_the_start_once(start, length):
    made = (await book(start=start)).prompt(12, Arrival(0, length, 1))
    assert len(made) == length
    assert made[: len(start)] == list(start)[:length]
    assert 257 not in made[len(start) :]
    assert bytes(made[len(start) :]).startswith(b"210\n\n"[: max(0, length - len(start))])


async def test_prompts_are_real_text_and_no_two_begin_alike():
    one = await book()
    made = [bytes(one.prompt(index, Arrival(0, 400, 1))).decode() for index in range(300)]
    assert len({text[:8] for text in made}) == 300, "a prefix cache has nothing to share but the odd block"
    assert all(any(prompt[:40] in text for prompt in PROMPTS) for text in made)
    again = await book()
    assert bytes(again.prompt(7, Arrival(0, 400, 1))).decode() == made[7]
    assert bytes((await book(seed=1)).prompt(7, Arrival(0, 400, 1))).decode() != made[7]
    next_run = bytes((await book(nonce=5)).prompt(7, Arrival(0, 400, 1))).decode()
    assert (next_run[:2], made[7][:2]) == ("75", "70"), "another run shares no prefix"
    assert next_run[2:] == made[7][2:], "and is the same load"


@pytest.mark.parametrize("block_tokens", [512, 40, 16])
async def test_equal_hash_ids_are_equal_tokens_and_others_are_not(block_tokens):
    """Of every two prompts exactly the blocks are shared whose names are."""
    one = await book(start=(257,), block_tokens=block_tokens)
    draw = np.random.default_rng(5)
    names = [(0, 1, 2, 3), (0, 1, 2, 4), (0, 5, 6), (7,), *(tuple(draw.integers(8, 99_999, 3)) for _ in range(40))]
    prompts = [one.prompt(place, Arrival(0, len(ids) * block_tokens, 1, ids)) for place, ids in enumerate(names)]
    for (first, made), (second, other) in itertools.combinations(zip(names, prompts, strict=True), 2):
        shared = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        alike = next((place for place, (a, b) in enumerate(zip(made, other, strict=False)) if a != b), None)
        assert shared is not None and alike is not None
        assert 1 + shared * block_tokens <= alike < 1 + shared * block_tokens + 8


async def test_a_scaled_trace_still_covers_its_prompts(mooncake):
    for factor in (1.0, 0.37, 0.0123, 0.001):
        one = await book(block_tokens=traces.scaled_block_tokens(factor))
        for arrival in traces.scaled(traces.read_trace(mooncake), factor):
            assert len(one.prompt(0, arrival)) == arrival.prompt_tokens


async def test_texts_as_written_go_round_before_one_comes_again():
    texts = [f"text {name}" for name in "abcdefg"]
    one = await book(texts=texts)
    made = [one.prompt(index, Arrival(0, None, 1)) for index in range(21)]
    assert made[0].startswith("0-0. text")
    for turn in range(3):
        assert {text.split(". ")[1] for text in made[7 * turn : 7 * turn + 7]} == set(texts)
    assert len({text.split()[0] for text in made}) == 21
    chat = (await book(texts=texts, chat=True)).prompt(3, Arrival(0, None, 1))
    assert chat == [{"role": "user", "content": made[3]}]


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"question_id": 81, "turns": ["Ünïcode first", "second"]}, {"prompt": "just one"}]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_prompts(path) == ("Ünïcode first", "just one")
    assert read_prompts(None) == PROMPTS
    assert len(PROMPTS) == len(set(PROMPTS)) >= 36
    for wrong in ('{"turns": []}', '{"turns": "a"}\n{}', '"text"', "{", '{"prompt": ""}'):
        path.write_text(f'{{"prompt": "fine"}}\n{wrong}\n')
        with pytest.raises(InvalidParameter, match=r"prompts.jsonl:[23]: "):
            read_prompts(path)
    path.write_text("\n")
    with pytest.raises(InvalidParameter, match="no prompt"):
        read_prompts(path)
