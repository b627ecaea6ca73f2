"""The pool against a model of it, and the prefix cache against a list of prefixes."""

from __future__ import annotations

import hashlib
import itertools
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from scheduler.blocks import BlockPool, count_references
from scheduler.prefix import PrefixCache
from spec.errors import OutOfBlocks


class PoolAgainstModel(RuleBasedStateMachine):
    """Content is tracked beside the pool: what find() returns must hold what was published, and only that."""

    tables = Bundle("tables")

    @initialize(num_blocks=st.integers(1, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, 4)
        self.references = [0] * num_blocks
        self.generations = [0] * num_blocks
        self.content: list[bytes | None] = [None] * num_blocks
        self.idle: list[int] = []  # cached blocks, least recently used first

    @rule(target=tables, count=st.integers(0, 5))
    def allocate(self, count: int) -> object:
        free = [b for b in range(self.pool.num_blocks) if not self.references[b] and self.content[b] is None]
        if count > len(free) + len(self.idle):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return multiple()
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        evicted = self.idle[: max(0, count - len(free))]
        assert set(blocks) <= set(free) | set(evicted), "free blocks first, then the least recently used"
        self.idle = self.idle[len(evicted) :]
        for block in blocks:
            assert self.references[block] == 0
            assert self.pool.generation(block) == self.generations[block] + 1
            self.references[block], self.content[block] = 1, None
            self.generations[block] += 1
        return tuple(blocks)

    @rule(target=tables, table=tables)
    def hold(self, table: tuple[int, ...]) -> tuple[int, ...]:
        assert self.pool.hold(table) == table
        for block in table:
            self.references[block] += 1
        return table

    @rule(table=consumes(tables))
    def release(self, table: tuple[int, ...]) -> None:
        self.pool.release(table)
        for block in reversed(table):
            self.references[block] -= 1
            if self.references[block] == 0 and self.content[block] is not None:
                self.idle.append(block)

    @rule(table=tables, name=st.integers(0, 5))
    def publish(self, table: tuple[int, ...], name: int) -> None:
        content = bytes([name])
        for block in table[:1]:
            if self.content[block] is None:
                assert self.pool.publish(block, content) == (content not in self.content)
                if content not in self.content:
                    self.content[block] = content

    @rule(target=tables, name=st.integers(0, 5))
    def find(self, name: int) -> object:
        block = self.pool.find(bytes([name]))
        if block is None:
            assert bytes([name]) not in self.content
            return multiple()
        assert self.content[block] == bytes([name])
        if self.references[block] == 0:
            self.idle.remove(block)
        self.references[block] += 1
        return self.pool.hold([block])

    @invariant()
    def agrees(self) -> None:
        self.pool.check(dict(enumerate(self.references)))
        assert [self.pool.generation(b) for b in range(self.pool.num_blocks)] == self.generations
        assert self.pool.num_cached == len(self.idle)
        assert self.pool.num_held == sum(count > 0 for count in self.references)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_held == self.pool.num_blocks


TestPool = PoolAgainstModel.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)


def test_a_block_released_once_too_often_is_a_defect() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(blocks)


def test_check_finds_a_reference_nobody_owns() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    pool.check(count_references([table]))
    with pytest.raises(AssertionError):
        pool.check(count_references([table, table]))
    with pytest.raises(AssertionError):
        pool.check({})


def test_blocks_freed_a_moment_ago_can_still_be_held() -> None:
    """The prefill service takes its hold after commit; an abort may fall between the two."""
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    generations = [pool.generation(block) for block in table]
    pool.release(table)
    pool.hold(table)
    pool.allocate(2)
    assert [pool.generation(block) for block in table] == generations
    pool.release(table)
    pool.check()


def full_table(pool: BlockPool, prefix: PrefixCache, tokens: list[int]) -> list[int]:
    table = pool.allocate(pool.blocks_for(len(tokens)))
    hashes = prefix.hashes(tokens)
    prefix.publish(hashes, table, 0, len(hashes))
    return table


@pytest.mark.parametrize("block_tokens", [1, 3, 16])
def test_match_finds_the_longest_common_prefix_of_whole_blocks(block_tokens: int) -> None:
    pool = BlockPool(200, block_tokens)
    prefix = PrefixCache(pool, b"model")
    stored = [[*range(20)], [*range(10), *range(50, 61)], [5], [*range(40, 47)]]
    tables = [full_table(pool, prefix, tokens) for tokens in stored]
    for table in tables:
        pool.release(table)
    for wanted in [[], *stored, [*range(19)], [*range(21)], [*range(10), 50, 99], [1, *range(20)], [5, 5]]:
        common = 0
        for tokens in stored:
            same = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(tokens, wanted, strict=False))
            )
            common = max(common, same // block_tokens)
        expected = min(common, max(len(wanted) - 1, 0) // block_tokens)
        blocks = prefix.match(wanted)
        assert len(blocks) == expected
        pool.check(count_references([blocks]))
        pool.release(blocks)
    assert pool.num_held == 0


def test_the_hash_is_the_documented_chain() -> None:
    prefix = PrefixCache(BlockPool(1, 2), b"salt")
    root = hashlib.blake2b(b"salt", digest_size=32).digest()
    first = hashlib.blake2b(root + struct.pack("=qq", 5, 6), digest_size=32).digest()
    second = hashlib.blake2b(first + struct.pack("=qq", 7, 8), digest_size=32).digest()
    assert prefix.hashes([5, 6, 7, 8, 9]) == [first, second]
    grown = [first]
    prefix.extend(grown, [7, 8, 9])
    assert grown == [first, second]


def test_another_salt_is_another_cache() -> None:
    pool = BlockPool(8, 2)
    table = full_table(pool, PrefixCache(pool, b"revision 1"), [1, 2, 3, 4])
    assert PrefixCache(pool, b"revision 1").match([1, 2, 3, 4, 5]) == table
    assert PrefixCache(pool, b"revision 2").match([1, 2, 3, 4, 5]) == []
    assert PrefixCache(pool, b"revision 1", enabled=False).match([1, 2, 3, 4, 5]) == []


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = BlockPool(4, 2)
    prefix = PrefixCache(pool, b"")
    table = full_table(pool, prefix, [*range(8)])
    pool.release(table)
    for evicted in range(1, 4):
        pool.allocate(1)
        found = prefix.match([*range(9)])
        assert found == table[: 4 - evicted]
        pool.release(found)


def test_an_adapter_has_a_cache_of_its_own() -> None:
    pool = BlockPool(12, 2)
    prefix, tokens = PrefixCache(pool, b"model"), [1, 2, 3, 4]
    adapters = ["", "poems@1", "poems@2"]
    chains = [prefix.hashes(tokens, adapter) for adapter in adapters]
    assert len({content for chain in chains for content in chain}) == 6
    tables = [pool.allocate(2) for _ in adapters]
    for chain, table in zip(chains, tables, strict=True):
        prefix.publish(chain, table, 0, 2)
    for adapter, table in zip(adapters, tables, strict=True):
        assert prefix.match([*tokens, 5], prefix.hashes([*tokens, 5], adapter)) == table
    grown = chains[1][:1]
    prefix.extend(grown, tokens[2:], "poems@1")
    assert grown == chains[1]
