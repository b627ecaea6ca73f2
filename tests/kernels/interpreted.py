"""Each Triton kernel against its reference, on CPU tensors in the Triton interpreter.

Run by test_interpreter.py in a process of its own: TRITON_INTERPRET has to be set before triton is imported, and must
not be set where kernels compile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from paged_sequences import Heads, Options, PagedSequences
from quantised_weights import FORMS, drawn_weight, magnitudes
from rope_inputs import CASES, NORMED, QUANTISED, Inputs, rows_at_the_ends
from torch import Tensor

from kernels import (
    fp8_linear,
    gated_activation,
    linear,
    moe_mlp,
    moe_route,
    paged_attention_gpu,
    quantised_linear,
    rms_norm,
    rope_kv_write,
    sampling,
    tuning,
)
from kernels.cpu import library
from kernels.jit import jit, tl
from kernels.kv_rows import SCALE_BYTES, dequantise_rows, quantise_rows
from kernels.linear import PackedLinear

GUARD = 64
TOLERANCES = {torch.float32: (1e-5, 1e-6), torch.float16: (2e-3, 1e-3)}  # about two roundings of the dtype
DTYPES = list(TOLERANCES)


def unwritten(dtype: torch.dtype) -> float:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a launcher allocates is full of NaN and lies between guards of NaN, which must be whole at the end."""
    buffers: list[Tensor] = []
    plain_new_empty = Tensor.new_empty

    def allocate(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        buffers.append(torch.full((shape.numel() + 2 * GUARD,), unwritten(dtype), dtype=dtype))
        return buffers[-1][GUARD:-GUARD].view(shape)

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        shape = torch.Size(size[0] if size and isinstance(size[0], tuple) else size)
        if options or shape.numel() == 0:  # the interpreter's own
            return plain_new_empty(self, *size, dtype=dtype, **options)
        return allocate(shape, dtype or self.dtype)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", lambda like: allocate(like.shape, like.dtype))
    torch.manual_seed(0)
    yield
    assert buffers
    for buffer in buffers:
        whole = buffer.isnan() if buffer.is_floating_point() else buffer == unwritten(buffer.dtype)
        assert whole[:GUARD].all(), "written before the output"
        assert whole[-GUARD:].all(), "written after the output"


def in_poison(values: Tensor) -> Tensor:
    """The same values between rows of NaN, so that a read beside them shows."""
    buffer = torch.full((values.numel() + 2 * GUARD,), float("nan"), dtype=values.dtype)
    buffer[GUARD:-GUARD] = values.flatten()
    return buffer[GUARD:-GUARD].view(values.shape)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    rtol, atol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 6), (3, 123), (5, 576), (37, 64)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(num_tokens: int, hidden_size: int, with_residual: bool, dtype: torch.dtype) -> None:
    x = in_poison(torch.randn(num_tokens, hidden_size, dtype=dtype))
    residual = in_poison(torch.randn(num_tokens, hidden_size, dtype=dtype)) if with_residual else None
    weight = in_poison(torch.randn(hidden_size, dtype=dtype))
    for offset in (0.0, 1.0):
        normed, stream = rms_norm.launch(x, weight, 1e-5, residual, offset=offset)
        expected_normed, expected_stream = rms_norm.reference(x, weight, 1e-5, residual, offset=offset)
        assert_close(normed, expected_normed)
        assert torch.equal(stream, expected_stream)


def test_rows_behind_the_last_of_a_tile_are_left_alone() -> None:
    """Numbers lie behind x here: where its rows are copied too far, they are seen between the guards."""
    rows = torch.randn(2, 40, 64)
    normed, stream = rms_norm.launch(rows[0, :37], torch.ones(64), 1e-5, rows[1, :37])
    assert torch.equal(stream, rows[0, :37] + rows[1, :37])
    assert normed.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "intermediate_size"), [(1, 6), (3, 431), (2, 1536)])
@pytest.mark.parametrize("kind", get_args(gated_activation.ActivationKind))
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # gate / infinity is the 0 that is meant
def test_gated_activation(
    num_tokens: int, intermediate_size: int, kind: gated_activation.ActivationKind, dtype: torch.dtype
) -> None:
    gate_up = in_poison(4 * torch.randn(num_tokens, 2 * intermediate_size, dtype=dtype))
    assert_close(gated_activation.launch(gate_up, kind), gated_activation.reference(gate_up, kind))


def poisoned(case: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> Inputs:
    inputs = Inputs(CASES[case], 3, dtype, kv_dtype)
    inputs.qkv, inputs.cos, inputs.sin = (in_poison(each) for each in (inputs.qkv, inputs.cos, inputs.sin))
    for name, norm in inputs.norms.items():
        if norm is not None:
            inputs.options[name] = in_poison(norm)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_rope_kv_write(case: str, dtype: torch.dtype) -> None:
    ours, theirs = (poisoned(case, dtype, dtype) for _ in range(2))
    assert_close(ours.run(rope_kv_write.launch), theirs.run(rope_kv_write.reference))
    for one, other in zip(ours.written(), theirs.written(), strict=True):
        if one is not None:
            assert_close(one, other)


@pytest.mark.parametrize("case", NORMED)
def test_a_head_is_rounded_between_its_norm_and_its_turn(case: str) -> None:
    inputs = poisoned(case, torch.float16, torch.float16)
    queries, (keys, _) = inputs.run(rope_kv_write.launch), inputs.written()
    normed = in_poison(inputs.normed_by(rms_norm.launch))
    turned = inputs.run(rope_kv_write.launch, normed, rotary_offset=inputs.case.rotary_offset)
    assert torch.equal(turned, queries)
    assert torch.equal(inputs.written()[0], keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("case", CASES)
def test_row_quantised_write(case: str, kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The bits of `quantise_rows` on what blocks of the activations' dtype get."""
    exact, quantised = (poisoned(case, dtype, stored) for stored in (dtype, kv_dtype))
    assert torch.equal(exact.run(rope_kv_write.launch), quantised.run(rope_kv_write.launch))
    for plain, row in zip(exact.written(), quantised.written(), strict=True):
        if plain is not None:
            assert torch.equal(row.view(torch.uint8), quantise_rows(plain, kv_dtype).view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # infinity · 0, in lanes that do not turn
def test_codes_at_the_ends(kv_dtype: torch.dtype) -> None:
    rows = rows_at_the_ends(60, 19)
    rows[8, 3], rows[9, 3] = float("nan"), -float("inf")
    blocks = torch.zeros(12, 1, 5, 19 + SCALE_BYTES, dtype=torch.uint8).view(kv_dtype)
    no_turn, index = torch.empty(1, 0), torch.arange(60)
    queries = torch.zeros(60, 19)
    rope_kv_write.launch(torch.cat((queries, rows), 1), no_turn, no_turn, 0 * index, index, blocks, None, 1)
    found, expected = blocks.view(60, -1), quantise_rows(rows, kv_dtype)
    finite = rows.isfinite().all(-1)
    assert torch.equal(found[finite].view(torch.uint8), expected[finite].view(torch.uint8))
    assert not dequantise_rows(found[8:10]).isfinite().any()


ATTENTION_CASES = {  # heads, lengths of (queries, context), block_tokens
    "one": (Heads(1, 1, 16), [(1, 1)], 16),
    "decodes": (Heads(9, 3, 64), [(1, 9), (1, 1), (1, 70)], 16),
    "decodes, odd blocks": (Heads(6, 2, 20), [(1, 34), (1, 35)], 7),
    "decodes, one KV head": (Heads(20, 1, 32), [(1, 5), (1, 33)], 4),
    "decodes, latent": (Heads(16, 1, 48, 32, True), [(1, 5), (1, 70)], 16),
    "decodes, latent of odd size": (Heads(21, 1, 44, 24, True), [(1, 40), (1, 33)], 7),
    "a group of several tiles": (Heads(70, 1, 24, 16, True), [(1, 5), (2, 33)], 16),
    "decodes, values nearly keys": (Heads(2, 1, 48, 40, True), [(1, 5), (1, 33)], 16),
    "one chunk": (Heads(4, 4, 32), [(23, 23)], 16),
    "chunk after a prefix": (Heads(6, 3, 16), [(42, 75)], 16),
    "chunk of narrow values": (Heads(4, 2, 48, 32), [(10, 75)], 16),
    "mixed": (Heads(8, 2, 16), [(1, 40), (19, 19), (1, 3), (18, 66), (1, 65)], 5),
    "mixed, latent": (Heads(16, 1, 48, 32, True), [(1, 40), (9, 9), (8, 66)], 5),
}
ALL_OPTIONS = Options(window=33, softcap=2.0, sinks=True)


def check_attention(
    heads: Heads,
    lengths: list[tuple[int, int]],
    block_tokens: int,
    options: Options,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    num_splits: int,
) -> None:
    sequences = PagedSequences(heads, [context for _, context in lengths], dtype, kv_dtype, block_tokens)
    spans = [(index, context - queries, context) for index, (queries, context) in enumerate(lengths)]
    (q, keys, values, tables, *others), keywords = sequences.call(spans, options)
    tables[tables < 0] = 2**30  # the read of a block that nobody sees crashes
    actual = paged_attention_gpu.launch(in_poison(q), keys, values, tables, *others, **keywords, num_splits=num_splits)
    expected = np.concatenate([sequences.expected(span, options)[0] for span in spans])
    assert_close(actual, torch.from_numpy(expected).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("case", list(ATTENTION_CASES))
def test_paged_attention(case: str, num_splits: int, dtype: torch.dtype) -> None:
    check_attention(*ATTENTION_CASES[case], Options(), dtype, dtype, num_splits)


@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("case", ["decodes, odd blocks", "decodes, latent", "chunk of narrow values"])
def test_paged_attention_of_row_quantised_blocks(case: str, num_splits: int, kv_dtype: torch.dtype | None) -> None:
    dtype = torch.float32 if num_splits > 1 else torch.float16
    check_attention(*ATTENTION_CASES[case], ALL_OPTIONS, dtype, kv_dtype or dtype, num_splits)


@pytest.mark.parametrize("options", [Options(window=1), Options(window=20), Options(softcap=2.0), Options(sinks=True)])
@pytest.mark.parametrize("case", ["decodes, odd blocks", "mixed, latent"])
@pytest.mark.parametrize("num_splits", [1, 4])
def test_options_of_paged_attention(case: str, num_splits: int, options: Options) -> None:
    check_attention(*ATTENTION_CASES[case], options, torch.float32, torch.float32, num_splits)


ROUTES: dict[str, tuple[int, int, dict[str, Any]]] = {  # experts, per token
    "two": (2, 1, {"scoring": "softmax", "normalise": True}),
    "softmax": (60, 6, {"scoring": "softmax", "normalise": False, "scale": 16.0}),
    "softmax_chosen": (33, 4, {"scoring": "softmax_chosen", "normalise": False}),
    "groups": (40, 6, {"scoring": "softmax", "normalise": True, "num_groups": 8, "groups_per_token": 3}),
    "groups by two": (
        42,
        5,
        {"scoring": "sigmoid", "normalise": True, "num_groups": 6, "groups_per_token": 2, "group_score": "top2"},
    ),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", list(ROUTES))
def test_moe_route(case: str, with_bias: bool) -> None:
    num_experts, experts_per_token, options = ROUTES[case]
    logits = in_poison(3 * torch.randn(6, num_experts))
    logits[4] = 0.0
    logits[5, num_experts // 2] = float("nan")
    if with_bias:
        options = {**options, "bias": in_poison(torch.randn(num_experts))}
    expert_ids, weights = moe_route.launch(logits, experts_per_token=experts_per_token, **options)
    expected_ids, expected = moe_route.reference(logits, experts_per_token=experts_per_token, **options)
    assert torch.equal(expert_ids[:5], expected_ids[:5])
    assert ((expert_ids[5] >= 0) & (expert_ids[5] < num_experts)).all()
    assert weights[5].isnan().all()
    assert_close(weights[:5], expected[:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "swiglu_clamped"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "intermediate_size", "hidden_size", "experts_per_token", "with_bias"),
    [(1, 1, 1, 1, 1, False), (9, 5, 33, 70, 3, True), (41, 2, 20, 40, 2, False), (70, 1, 16, 8, 1, True)],
)
def test_moe_mlp(
    num_tokens: int,
    num_experts: int,
    intermediate_size: int,
    hidden_size: int,
    experts_per_token: int,
    with_bias: bool,
    kind: Any,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "shared_library", lambda: None)
    gate_up = torch.randn(num_experts + 1, 2 * intermediate_size, hidden_size) / hidden_size**0.5
    down = torch.randn(num_experts + 1, hidden_size, intermediate_size) / intermediate_size**0.5
    gate_up[-1] = down[-1] = float("nan")  # an expert that nobody asks for
    biases = [torch.randn(num_experts + 1, size) for size in (2 * intermediate_size, hidden_size)]
    tensors = [in_poison(tensor.to(dtype)) for tensor in (gate_up, down, *(biases if with_bias else []))]
    experts = moe_mlp.pack_experts(*tensors)
    x = in_poison(torch.randn(num_tokens, hidden_size, dtype=dtype))
    expert_ids = torch.randint(-1, num_experts, (num_tokens, experts_per_token))
    weights = torch.rand(num_tokens, experts_per_token).masked_fill(expert_ids < 0, float("nan"))
    expected = moe_mlp.reference(x, experts, expert_ids, weights, kind)
    assert_close(moe_mlp.launch(x, experts, expert_ids, weights, kind), expected)


EXPERT_FORMS = [form for form in FORMS if form not in ("int8 per 32", "int4 per 64, zero points in half")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [*EXPERT_FORMS, "plain gates and ups"])
def test_moe_mlp_of_quantised_experts(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows so small that sums, whose errors are as large as their terms, stay small: gates are nearly linear."""
    monkeypatch.setattr(library, "shared_library", lambda: None)
    num_tokens, num_experts, intermediate_size, hidden_size, with_bias = 23, 3, 33, 70, form != "nvfp4"

    def packed(n: int, k: int, kind: str) -> list[PackedLinear]:
        bias = in_poison(torch.randn(n).to(dtype) / 64) if with_bias else None
        if kind not in FORMS:
            return [linear.pack(in_poison((torch.randn(n, k) / k**0.5).to(dtype)), bias) for _ in range(num_experts)]
        weights = [drawn_weight(FORMS[kind], n, k, seed) for seed in range(num_experts)]
        return [linear.pack_quantised(weight, dtype, bias) for weight in weights]

    gate_up = packed(2 * intermediate_size, hidden_size, form)
    down = packed(hidden_size, intermediate_size, form if form in FORMS else "mxfp4")
    experts = moe_mlp.join_experts(gate_up, down)
    x = in_poison((torch.randn(num_tokens, hidden_size) / 4096).to(dtype))
    expert_ids = torch.randint(-1, num_experts - 1, (num_tokens, 2))  # the last expert has no row
    weights = torch.rand(num_tokens, 2).masked_fill(expert_ids < 0, float("nan"))
    expected = moe_mlp.reference(x, experts, expert_ids, weights, "silu")
    found = moe_mlp.launch(x, experts, expert_ids, weights, "silu")
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 4e-3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "k"), [(1, 1), (3, 128), (5, 300), (17, 129)])
def test_fp8_rows(num_rows: int, k: int, dtype: torch.dtype) -> None:
    x = in_poison((torch.randn(num_rows, k) * torch.exp2(torch.randint(-12, 12, (num_rows, 1)))).to(dtype))
    for found, expected in zip(fp8_linear.quantise_launch(x), fp8_linear.quantise(x), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_fp8_rows_at_the_ends() -> None:
    """Every exponent of float32, its smallest numbers, what just is and just is not the greatest of a scale, zeros."""
    exponents = torch.exp2(torch.arange(-149, 128).double()).float()
    x = torch.stack([exponents, exponents * 1.75, torch.nextafter(exponents * 1.75, torch.tensor(3e38))], dim=1)
    x = torch.cat([x, torch.zeros(1, 3), torch.full((1, 3), 3.4e38)])
    x[:, 0] *= -1
    for found, expected in zip(fp8_linear.quantise_launch(x), fp8_linear.quantise(x), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    broken = torch.ones(2, 300)
    broken[0, 130], broken[1, 299] = float("inf"), float("nan")
    codes, scales = fp8_linear.quantise_launch(broken)
    values = codes.float() * scales.repeat_interleave(128, 1)[:, :300]
    expected = torch.ones(2, 300, dtype=torch.bool)
    expected[0, 128:256] = expected[1, 256:] = False
    assert torch.equal(values.isfinite(), expected)


@pytest.mark.parametrize("form", ["fp8 per output", "fp8 per 128"])
@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 5, 7), (3, 70, 300), (19, 33, 130)])
def test_fp8_linear(num_rows: int, n: int, k: int, form: str) -> None:
    weight, x = drawn_weight(FORMS[form], n, k), in_poison(torch.randn(num_rows, k))
    sizes = magnitudes(fp8_linear.rounded(x), weight)
    for bias in (None, in_poison(torch.randn(n))):
        found = fp8_linear.launch(x, weight, bias, wide=True)
        expected = fp8_linear.reference(x, weight, bias, wide=True)
        assert ((found - expected).abs() <= sizes * (k + 4) * 2**-24 + 1e-6).all()
    small = in_poison((x / 256).half())
    assert torch.equal(fp8_linear.launch(small, weight), fp8_linear.launch(small, weight, wide=True).half())


@pytest.mark.parametrize("form", ["fp8 per output", "fp8 per 128"])
def test_moe_mlp_of_fp8_rows(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "shared_library", lambda: None)
    monkeypatch.setattr(fp8_linear, "has_products", lambda device: True)
    num_tokens, num_experts, intermediate_size, hidden_size = 23, 3, 33, 140

    def packed(n: int, k: int) -> list[PackedLinear]:
        weights = [drawn_weight(FORMS[form], n, k, seed) for seed in range(num_experts)]
        bias = in_poison(torch.randn(n) / 64)
        return [
            linear.pack_quantised(dataclasses.replace(weight, activations="fp8"), torch.float32, bias)
            for weight in weights
        ]

    experts = moe_mlp.join_experts(packed(2 * intermediate_size, hidden_size), packed(hidden_size, intermediate_size))
    x = in_poison(torch.randn(num_tokens, hidden_size) / 4096)
    expert_ids = torch.randint(-1, num_experts - 1, (num_tokens, 2))
    weights = torch.rand(num_tokens, 2).masked_fill(expert_ids < 0, float("nan"))
    found = moe_mlp.launch(x, experts, expert_ids, weights, "silu")
    # What lies between gates and down is rounded: a bit of the sums' order may move a code.
    expected = moe_mlp.reference(x, experts, expert_ids, weights, "silu")
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=scale * 1e-2)


def sampled(scores: Tensor, choices: list[tuple[float, int, float, float]], first_id: int = 0) -> Tensor:
    """What kernel and reference both draw, a row for each choice."""
    options = in_poison(torch.tensor([sampling.options_of(*choice) for choice in choices], dtype=torch.float64))
    streams = torch.tensor([sampling.stream_of(seed, 9) for seed in range(len(choices))])
    with tuning.choosing(lambda operation, shape: tuning.Config({"tokens": 64}, 1, 1)):  # a row is several tiles
        token_ids, keys = sampling.launch(scores, options, streams, first_id)
    expected_ids, expected = sampling.reference(scores, options, streams, first_id)
    assert torch.equal(token_ids, expected_ids)
    found = token_ids != sampling.NO_TOKEN
    torch.testing.assert_close(keys[found], expected[found], rtol=1e-12, atol=1e-12)
    assert not keys[~found].isfinite().any()
    return token_ids


FILTERS = [  # temperature, top-k, top-p, min-p
    (0.0, 5, 0.5, 0.3),
    (1.0, 0, 1.0, 0.0),
    (2.5, 1, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
    (1.0, 10_000, 0.9, 0.0),
    (0.3, 0, 1e-6, 0.0),
    (2.5, 0, 0.999, 0.01),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (1.5, 20, 0.8, 0.02),
]


@pytest.mark.parametrize(
    ("vocab", "dtype", "choices"),
    [
        (1, torch.float32, FILTERS[3::3]),
        (64, torch.float32, FILTERS[2::3]),
        (123, torch.float32, FILTERS),
        (123, torch.float16, FILTERS[3::3]),
        (123, torch.bfloat16, FILTERS[3::3]),
    ],
)
def test_sampling(vocab: int, dtype: torch.dtype, choices: list[tuple[float, int, float, float]]) -> None:
    sampled(in_poison((3 * torch.randn(len(choices), vocab)).to(dtype)), choices)


def test_sampling_among_equal_scores() -> None:
    """In steps of a half, both zeros among them, over three tiles; of a part of the vocabulary that begins at 500."""
    scores = torch.randn(len(FILTERS), 150).mul(2).round().div(2).mul(torch.tensor([1.0, -1.0]).repeat(75))
    assert (sampled(in_poison(scores), FILTERS, first_id=500) >= 500).all()


@jit
def _kept_kernel(scores_ptr, options_ptr, found_ptr, vocab, greatest, TILE: tl.constexpr):
    temperature, top_k, top_p = tl.load(options_ptr), tl.load(options_ptr + 1), tl.load(options_ptr + 2)
    greatest = tl.load(scores_ptr + greatest)
    edge, quota = sampling._kept_from(scores_ptr, vocab, temperature, top_k, top_p, greatest, sampling.MASS_BITS, TILE)
    tl.store(found_ptr, edge)
    tl.store(found_ptr + 1, quota)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_edge_among_neighbouring_scores(sign: int) -> None:
    """Numbers of float32 with none between them, on both sides of a power of two: where the filters end, exactly."""
    for top_k, top_p in ((1, 1.0), (20, 1.0), (69, 1.0), (0, 0.01), (0, 0.4), (50, 0.7), (0, 0.99)):
        bits = torch.randint(-3, 4, (70,), dtype=torch.int32) + 0x3F800000
        scores = in_poison(sign * bits.view(torch.float32))
        options = torch.tensor(sampling.options_of(1e6, top_k, top_p, 0.0), dtype=torch.float64)  # all masses are equal
        found = options.new_empty(2, dtype=torch.int64)
        _kept_kernel[(1,)](scores, options, found, 70, int(scores.argmax()), 64)
        kept = math.ceil(top_p * (top_k or 70))
        edge = scores.sort(descending=True).values[kept - 1]
        assert found[0] == (int(edge.view(torch.int32)) if sign > 0 else int(edge.view(torch.int32)) ^ 0x7FFFFFFF)
        assert found[1] == kept - int((scores > edge).sum())


def test_sampling_of_rows_that_cannot_be_drawn() -> None:
    scores = torch.randn(8, 100)
    scores[0, 70], scores[1, 3], scores[2], scores[3, 1:] = float("nan"), float("inf"), -float("inf"), -float("inf")
    scores[4:, ::2] = -float("inf")
    choices = [FILTERS[row] for row in (9, 4, 6, 9, 1, 4, 9, 3)]
    assert sampled(in_poison(scores), choices)[:4].tolist() == [*[sampling.NO_TOKEN] * 3, 0]


def test_an_empty_batch_of_rows() -> None:
    assert sampling.launch(torch.empty(0, 8), torch.empty(0, 4), torch.empty(0, dtype=torch.int64))[0].shape == (0,)
    assert quantised_linear.launch(torch.empty(0, 8), drawn_weight(FORMS["mxfp4"], 4, 8)).shape == (0, 4)
    assert gated_activation.launch(torch.empty(0, 8), "silu").shape == (0, 4)
    assert rms_norm.launch(torch.empty(0, 8), torch.ones(8), 1e-5)[0].shape == (0, 8)
    assert moe_route.launch(torch.empty(0, 8), experts_per_token=2, scoring="softmax", normalise=True)[0].shape == (
        0,
        2,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("num_rows", "n", "k"), [(1, 5, 7), (3, 70, 300), (19, 33, 130), (70, 5, 33)])
def test_quantised_linear(num_rows: int, n: int, k: int, form: str, dtype: torch.dtype) -> None:
    weight, x = drawn_weight(FORMS[form], n, k), in_poison(torch.randn(num_rows, k, dtype=dtype))
    sizes = magnitudes(x, weight)
    for bias in (None, in_poison(torch.randn(n, dtype=dtype))):
        found = quantised_linear.launch(x, weight, bias, wide=True)
        expected = quantised_linear.reference(x, weight, bias, wide=True)
        # Numbers are exact; with groups of eight they are scaled, and moved, before the product.
        rounding = 2**-10 if dtype == torch.float16 and weight.group == 8 else (k + 4) * 2**-24
        assert found.dtype == torch.float32
        assert ((found - expected).abs() <= sizes * rounding + 1e-6).all()
        small = in_poison(x / 256)
        rounded = quantised_linear.launch(small, weight, bias)
        exact = quantised_linear.launch(small, weight, bias, wide=True)
        assert torch.equal(rounded, exact.to(dtype))
