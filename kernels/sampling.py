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

from kernels.cpu.library import library_for

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
    top-p takes its part, where the scores are only those that can pass (0: the scores' own).

    Returns (token_ids [R] int64, keys [R] float64). A row without a finite maximum has NO_TOKEN and no finite key.
    """
    assert scores.shape[1] > 0
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
