"""The token of a row of scores: filters, then a race with numbers of its own for every token.

    G[t]   = -log(-log(u[t])), u[t] uniform in (0, 1): a number of (seed, position, token id) alone
    token  = argmax over the tokens t that the filters leave of  score[t] + temperature · G[t]

That is a draw from softmax(score / temperature) over them (the Gumbel-max trick: Gumbel 1954, Maddison et al. 2014,
arXiv:1411.0030; the same race run by exponentials: the least -log(u[t]) / p[t]). Nothing is summed for it, so it is the
same over parts of a vocabulary; and two distributions that run it with the same numbers mostly draw the same token
(Daliri et al. 2024, arXiv:2408.07978). Temperature 0 takes the greatest score.

    top-k  the k greatest scores stay
    top-p  the fewest greatest whose mass reaches top_p of the mass that top-k leaves (Holtzman et al. 2020,
           arXiv:1904.09751); mass[t] = round(2^40 · exp((score[t] - greatest) / temperature)), in whole numbers, whose
           sum no order changes
    min-p  those stay whose score is at least greatest + temperature · log(min_p) (arXiv:2407.01082)

Of equal scores, and of equal keys, the lower token id goes first. The numbers are those of SplitMix64 (Steele, Lea and
Flood 2014, doi:10.1145/2660193.2660195), whose n-th output from the state s is mix(s + n · γ): u[t] is the upper 52
bits of output t + 1 from the row's stream, which stream_of() makes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import tuning
from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton

NO_TOKEN = -1  # of a row without a finite maximum
MASS_BITS = 40  # a vocabulary of 2^22 tokens sums to less than 2^63
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def split_mix(state: int, count: int) -> int:
    """Output `count` (from 1) of SplitMix64 from `state`, both of 64 bits."""
    z = (state + count * _GAMMA) & _WORD
    z = ((z ^ (z >> 30)) * _FACTORS[0]) & _WORD
    z = ((z ^ (z >> 27)) * _FACTORS[1]) & _WORD
    return z ^ (z >> 31)


def stream_of(seed: int, position: int) -> int:
    """The state, as a signed number of 64 bits, from which the numbers of all tokens at a position come."""
    state = split_mix(split_mix(seed & _WORD, 1), position + 1)
    return _signed(state)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's mix of int64 words."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, count: int) -> Tensor:
    return (z >> count) & ((1 << (64 - count)) - 1)


def gumbel(streams: Tensor, ids: Tensor) -> Tensor:
    """streams: [R] int64; ids: [N] int64. G as above: [R, N] float64."""
    words = _mixed(streams[:, None] + (ids[None] + 1) * _signed(_GAMMA))
    uniform = (_shifted(words, 12).double() * 2 + 1) * 2.0**-53  # exact, and so is 1 - uniform
    return -torch.log(-torch.log(uniform))


def _masses(gaps: Tensor, temperature: Tensor) -> Tensor:
    """gaps: score - greatest, in float64."""
    scale = (1.0 / temperature).clamp(max=1e300)  # finite: 0 times it is 0
    return (torch.exp(gaps * scale) * 2.0**MASS_BITS).round().long()


def reference(
    scores: Tensor,
    options: Tensor,
    streams: Tensor,
    first_id: int = 0,
    ids: Tensor | None = None,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    width = scores.shape[1]
    ids = first_id + torch.arange(width, device=scores.device) if ids is None else ids
    temperature, top_k, top_p, floor = (option[:, None] for option in options.unbind(1))
    ordered, order = scores.double().sort(dim=1, descending=True, stable=True)
    greatest = ordered[:, :1]  # a NaN where there is one
    kept = (torch.arange(width, device=scores.device) < top_k) | (top_k <= 0)
    masses = _masses(ordered - greatest, temperature) * kept
    total = masses.sum(1, keepdim=True)
    if totals is not None:
        total = torch.where(totals[:, None] > 0, totals[:, None], total)
    wanted = (top_p * total).ceil().long()
    kept &= (masses.cumsum(1) - masses < wanted) | (top_p >= 1)
    kept &= ordered >= greatest + floor
    kept |= temperature == 0
    keys = ordered + temperature * gumbel(streams, ids).gather(1, order)
    keys = torch.where(kept, keys, -math.inf)
    best = keys.max(dim=1, keepdim=True).values
    token_ids = torch.where(keys == best, ids[order], torch.iinfo(torch.int64).max).min(dim=1).values
    found = greatest[:, 0].isfinite()
    return torch.where(found, token_ids, NO_TOKEN), torch.where(found, best[:, 0], greatest[:, 0])


@jit
def _mix(z, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr):
    """Of int64, whose shifts to the right bring the sign in: it is masked away."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * FACTOR_1
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * FACTOR_2
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@jit
def _rank(scores):
    """int32 in the order of the float32 scores; both zeros are one."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@jit
def _weight(scores, greatest, scale, MASS: tl.constexpr, MASS_BITS: tl.constexpr):
    """What a score counts, int64: its mass, or 1."""
    if MASS:
        return (tl.exp2((scores - greatest) * scale) * (1 << MASS_BITS) + 0.5).to(tl.int64)
    return tl.full(scores.shape, 1, tl.int64)


@jit
def _weight_from(row_ptr, vocab, low, greatest, scale, MASS: tl.constexpr, MASS_BITS: tl.constexpr, TILE: tl.constexpr):
    """Sum over the scores of rank `low` or more."""
    total = tl.zeros((TILE,), tl.int64)
    for start in range(0, vocab, TILE):
        place = start + tl.arange(0, TILE)
        scores = tl.load(row_ptr + place, place < vocab, other=float("-inf")).to(tl.float32)
        counts = (place < vocab) & (_rank(scores) >= low)
        total += tl.where(counts, _weight(scores, greatest, scale, MASS, MASS_BITS), 0)
    return tl.sum(total, 0)


@jit
def _edge(
    row_ptr, vocab, low, high, wanted, greatest, scale, MASS: tl.constexpr, MASS_BITS: tl.constexpr, TILE: tl.constexpr
):
    """(rank, above): the highest rank from which on the scores sum to `wanted`, and the sum above it. `low` is one such
    rank, and no score is above `high`; both int64. The interval is quartered by each pass over the row."""
    above = wanted * 0
    while low < high:
        step = (high - low) // 4 + 1
        first, second, third = tl.zeros((TILE,), tl.int64), tl.zeros((TILE,), tl.int64), tl.zeros((TILE,), tl.int64)
        for start in range(0, vocab, TILE):
            place = start + tl.arange(0, TILE)
            scores = tl.load(row_ptr + place, place < vocab, other=float("-inf")).to(tl.float32)
            rank = _rank(scores).to(tl.int64)
            weight = tl.where(place < vocab, _weight(scores, greatest, scale, MASS, MASS_BITS), 0)
            first += tl.where(rank >= low + step, weight, 0)
            second += tl.where(rank >= low + 2 * step, weight, 0)
            third += tl.where(rank >= low + 3 * step, weight, 0)
        sum_1, sum_2, sum_3 = tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0)
        if sum_3 >= wanted:
            low += 3 * step
        elif sum_2 >= wanted:
            high, above, low = low + 3 * step - 1, sum_3, low + 2 * step
        elif sum_1 >= wanted:
            high, above, low = low + 2 * step - 1, sum_2, low + step
        else:
            high, above = low + step - 1, sum_1
    return low, above


@jit
def _edge_mass(edge, greatest, scale, MASS_BITS: tl.constexpr):
    """The mass of a score, by its rank; 0 for ranks below that of -inf, which no score has."""
    bits = tl.where(edge >= 0, edge, edge ^ 0x7FFFFFFF).to(tl.int32)
    scores = bits.to(tl.float32, bitcast=True)
    scores = tl.where(scores == scores, scores, float("-inf"))
    return _weight(scores, greatest, scale, True, MASS_BITS)


@jit
def _greatest(row_ptr, vocab, TILE: tl.constexpr):
    """float32; infinite where there is a NaN."""
    maxima = tl.full((TILE,), float("-inf"), tl.float32)
    for start in range(0, vocab, TILE):
        place = start + tl.arange(0, TILE)
        scores = tl.load(row_ptr + place, place < vocab, other=float("-inf")).to(tl.float32)
        maxima = tl.maximum(maxima, tl.where(scores == scores, scores, float("inf")))
    return tl.max(maxima, 0)


@jit
def _kept_from(row_ptr, vocab, temperature, top_k, top_p, greatest, MASS_BITS: tl.constexpr, TILE: tl.constexpr):
    """(edge, quota): scores of a rank above the edge stay, and the first `quota` of those at it."""
    scale = tl.minimum(1.4426950408889634 / temperature, 1e30).to(tl.float32)  # finite: 0 times it is 0
    highest = _rank(greatest).to(tl.int64)
    edge, quota = tl.full((), -(1 << 31), tl.int64), highest * 0 + vocab
    if (top_k > 0) & (top_k < vocab):
        wanted = top_k.to(tl.int64)
        edge, above = _edge(row_ptr, vocab, edge, highest, wanted, greatest, scale, False, MASS_BITS, TILE)
        quota = wanted - above
    if top_p < 1:
        total = _weight_from(row_ptr, vocab, edge + 1, greatest, scale, True, MASS_BITS, TILE)
        total += quota * _edge_mass(edge, greatest, scale, MASS_BITS)
        wanted = tl.ceil(top_p * total.to(tl.float64)).to(tl.int64)
        edge, above = _edge(row_ptr, vocab, edge, highest, wanted, greatest, scale, True, MASS_BITS, TILE)
        each = tl.maximum(_edge_mass(edge, greatest, scale, MASS_BITS), 1)
        quota = (wanted - above + each - 1) // each
    return edge, quota


@jit
def _kernel(
    scores_ptr,  # [R, V] fp32, fp16 or bf16, rows contiguous
    options_ptr,  # [R, 4] fp64, contiguous: temperature, top-k, top-p, floor
    streams_ptr,  # [R] int64
    token_ids_ptr,  # [R] int64, written
    keys_ptr,  # [R] fp64, written
    row_stride,
    vocab,
    first_id,
    GAMMA: tl.constexpr,
    FACTOR_1: tl.constexpr,
    FACTOR_2: tl.constexpr,
    UNIT: tl.constexpr,  # 2^-53
    MASS_BITS: tl.constexpr,
    TILE: tl.constexpr,  # power of two
):
    """One program per row. Without a filter the row is read once; a filter reads it some times more."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scores_ptr + row * row_stride
    temperature = tl.load(options_ptr + 4 * row)
    top_k, top_p = tl.load(options_ptr + 4 * row + 1), tl.load(options_ptr + 4 * row + 2)
    floor, stream = tl.load(options_ptr + 4 * row + 3), tl.load(streams_ptr + row)

    least, edge, quota = tl.full((), float("-inf"), tl.float64), tl.full((), -(1 << 31), tl.int64), row * 0 + vocab
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (floor > float("-inf"))):
        greatest = _greatest(row_ptr, vocab, TILE)
        if tl.abs(greatest) < float("inf"):
            least = greatest.to(tl.float64) + floor
            edge, quota = _kept_from(row_ptr, vocab, temperature, top_k, top_p, greatest, MASS_BITS, TILE)

    best, winner = tl.full((), float("-inf"), tl.float64), row * 0 - 1
    seen, unsound = row * 0, tl.zeros((TILE,), tl.int32)
    slope, slack = (temperature * -0.6931471805599453).to(tl.float32), (temperature * 1e-4).to(tl.float32)
    for start in range(0, vocab, TILE):
        place = start + tl.arange(0, TILE)
        scores = tl.load(row_ptr + place, place < vocab, other=float("-inf")).to(tl.float32)
        unsound |= (scores != scores).to(tl.int32) | (scores == float("inf")).to(tl.int32)
        rank, ids = _rank(scores).to(tl.int64), first_id + place.to(tl.int64)
        ties = (rank == edge) & (place < vocab)
        stays = (rank > edge) & (place < vocab) & (scores.to(tl.float64) >= least)
        num_ties = tl.sum(ties.to(tl.int64), 0)
        if num_ties > 0:
            stays |= ties & (seen + tl.cumsum(ties.to(tl.int64), 0) <= quota) & (scores.to(tl.float64) >= least)
            seen += num_ties
        word = _mix(stream + (ids + 1) * GAMMA, FACTOR_1, FACTOR_2)
        # d = 1 - u is at least its upper 31 bits, and G at most -log(d): what cannot win is told in fp32.
        upper = ((word >> 33) & 0x7FFFFFFF) ^ 0x7FFFFFFF
        log2_low = tl.where(upper > 0, tl.log2(tl.maximum(upper, 1).to(tl.float32)) - 31.0, -53.0)
        bound = scores + slope * log2_low + slack + tl.minimum(tl.abs(scores), 1e38) * 1e-6
        if tl.max(tl.where(stays, bound, float("-inf")), 0).to(tl.float64) >= best:
            uniform = (((word >> 12) & 0xFFFFFFFFFFFFF) * 2 + 1).to(tl.float64) * UNIT
            keys = scores.to(tl.float64) - temperature * tl.log(-tl.log(uniform))
            keys = tl.where(stays, keys, float("-inf"))
            greatest_key = tl.max(keys, 0)
            if greatest_key > best:
                best, winner = greatest_key, tl.min(tl.where(keys == greatest_key, ids, 0x7FFFFFFFFFFFFFFF), 0)
    if tl.max(unsound, 0) > 0:
        best, winner = tl.full((), float("nan"), tl.float64), row * 0 - 1
    tl.store(token_ids_ptr + row, winner)
    tl.store(keys_ptr + row, best)


def launch(scores: Tensor, options: Tensor, streams: Tensor, first_id: int = 0) -> tuple[Tensor, Tensor]:
    num_rows, vocab = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    token_ids, keys = streams.new_empty(num_rows), options.new_empty(num_rows)
    if num_rows == 0:
        return token_ids, keys
    config = tuning.choose("sampling", scores.device, vocab=vocab)
    tile = min(triton.next_power_of_2(vocab), config.tiles["tokens"])
    _kernel[(num_rows,)](
        scores,
        options.contiguous(),
        streams.contiguous(),
        token_ids,
        keys,
        scores.stride(0),
        vocab,
        first_id,
        _signed(_GAMMA),
        *map(_signed, _FACTORS),
        2.0**-53,
        MASS_BITS,
        tile,
        **config.options,
    )
    return token_ids, keys


def sample(
    scores: Tensor,
    options: Tensor,
    streams: Tensor,
    first_id: int = 0,
    ids: Tensor | None = None,
    totals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """scores: [R, N] float32, of the tokens `ids` ([N] int64, rising), or of those from first_id on. options: [R, 4]
    float64, as options_of() makes one row's; streams: [R] int64, see stream_of(). totals: [R] int64, the mass of which
    top-p takes its part, where the scores are only those that can pass (0: the scores' own). ids and totals are for the
    CPU alone. On a GPU masses are computed in fp32: a token at the edge of top-p may be in there and out here.

    Returns (token_ids [R] int64, keys [R] float64). A row without a finite maximum has NO_TOKEN and no finite key.
    """
    assert scores.shape[1] > 0
    if scores.is_cuda:
        assert ids is None
        assert totals is None
        return launch(scores, options, streams, first_id)
    library = library_for(scores)
    if library is not None and scores.dtype == torch.float32:
        return library.sample(scores, options, streams, first_id, ids, totals)
    return reference(scores, options, streams, first_id, ids, totals)


def options_of(temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[float, float, float, float]:
    """top_k 0, top_p 1 and min_p 0 are off."""
    return temperature, float(top_k), top_p, temperature * math.log(min_p) if min_p > 0.0 else -math.inf


def masses(scores: Tensor, greatest: float, temperature: float) -> Tensor:
    """scores: [N] float32, none above `greatest`. As top-p sums them: [N] int64."""
    library = library_for(scores)
    if library is not None and scores.dtype == torch.float32:
        return library.masses(scores, greatest, temperature)
    return _masses(scores.double() - greatest, torch.tensor(temperature, dtype=torch.float64, device=scores.device))
