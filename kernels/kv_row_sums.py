"""The sums of which a digest of KV rows is made, in PyTorch and as parts of a Triton kernel that has rows in its hands.

kvtransfer/row_sums.py has the formula and its sources. All is modulo 2^64: in PyTorch with signed words.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.jit import jit, tl
from kernels.row_digest import BLOCK_STRIPES, PRIME, SECRET, STRIPE_BYTES


def terms(rows: Tensor, places: Tensor) -> Tensor:
    """rows [..., row_bytes] uint8, places [...] int64 -> [..., 8] int64, what each adds to the sums."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % STRIPE_BYTES))
    words = padded.view(torch.int64).view(*rows.shape[:-1], -1, 8)
    secret = secret_on(rows.device)
    found = torch.zeros_like(words[..., 0, :])
    for stripe in range(words.shape[-2]):
        within = stripe % BLOCK_STRIPES
        if stripe and not within:
            found = (found ^ _shifted(found, 47) ^ secret[BLOCK_STRIPES:]) * PRIME
        mixed = words[..., stripe, :] ^ secret[within : within + 8]
        swapped = words[..., stripe, [1, 0, 3, 2, 5, 4, 7, 6]]
        found = found + (mixed & 0xFFFFFFFF) * _shifted(mixed, 32) + swapped
    even = places + _signed(0x9E3779B97F4A7C15)
    even = (even ^ _shifted(even, 30)) * _signed(0xBF58476D1CE4E5B9)
    even = (even ^ _shifted(even, 27)) * _signed(0x94D049BB133111EB)
    even = even ^ _shifted(even, 31)
    odd = even << 32 | _shifted(even, 32)
    return (found ^ _shifted(found, 32)) * (torch.stack([even, odd] * 4, dim=-1) | 1)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """int64, to the right, with zeros behind: torch shifts the sign in."""
    return (x >> bits) & ((1 << 64 - bits) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


@functools.cache
def secret_on(device: torch.device) -> Tensor:
    return torch.tensor([_signed(word) for word in SECRET], dtype=torch.int64, device=device)


@jit
def words_of(parts, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART_BYTES: tl.constexpr):
    """[rows, columns] of any dtype of so many bytes -> [rows, stripes, 8] uint64."""
    in_word: tl.constexpr = 8 // PART_BYTES
    stripes: tl.constexpr = COLUMNS * PART_BYTES // 64
    if in_word == 1:
        words = parts.to(tl.uint64, bitcast=True)
    else:
        parts = parts.to(tl.uint8 if PART_BYTES == 1 else tl.uint16 if PART_BYTES == 2 else tl.uint32, bitcast=True)
        shift = (tl.arange(0, COLUMNS) % in_word * (8 * PART_BYTES)).to(tl.uint64)
        shifted = parts.to(tl.uint64) << shift[None, :]
        words = tl.sum(tl.reshape(shifted, (TILE_ROWS, COLUMNS // in_word, in_word)), 2)
    return tl.reshape(words, (TILE_ROWS, stripes, 8))


@jit
def accumulated(found, words, secret_ptr, first_stripe, NUM_STRIPES: tl.constexpr):
    """A of the formula, [rows, 8], with those of `words` [rows, stripes, 8] in it: stripes that begin a block of 16."""
    stripe = tl.arange(0, words.shape[1])[:, None]
    lane = tl.arange(0, 8)[None, :]
    secret = tl.load(secret_ptr + stripe + lane).to(tl.uint64, bitcast=True)[None, :, :]
    mixed = words ^ secret
    products = (mixed & 0xFFFFFFFF) * (mixed >> 32)
    products = tl.where((first_stripe + stripe < NUM_STRIPES)[None, :, :], products, 0)
    low, high = tl.split(tl.reshape(words, (words.shape[0], words.shape[1], 4, 2)))
    return found + tl.sum(products + tl.reshape(tl.join(high, low), words.shape), 1)


@jit
def scrambled(found, secret_ptr, PRIME: tl.constexpr):
    secret = tl.load(secret_ptr + 16 + tl.arange(0, 8)).to(tl.uint64, bitcast=True)
    return (found ^ (found >> 47) ^ secret[None, :]) * PRIME


@jit
def factors(place):
    """[rows] uint64 -> [rows, 8]: f of the formula, by splitmix64."""
    even = place + 0x9E3779B97F4A7C15
    even = (even ^ (even >> 30)) * 0xBF58476D1CE4E5B9
    even = (even ^ (even >> 27)) * 0x94D049BB133111EB
    even = even ^ (even >> 31)
    odd = (even << 32) | (even >> 32)
    return tl.where((tl.arange(0, 8) % 2 == 0)[None, :], even[:, None], odd[:, None]) | 1
