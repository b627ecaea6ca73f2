"""A tier's index against a list, and what a prefix cache tells of its use."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.blocks import BlockPool
from scheduler.prefix import PrefixCache
from scheduler.tiers import TierIndex

KEYS = [bytes([number]) for number in range(8)]
STEPS = st.lists(st.tuples(st.sampled_from(["admit", "use", "drop"]), st.sampled_from(KEYS), st.integers(1, 12)))


@given(st.integers(0, 30), STEPS)
def test_it_is_a_list_in_order_of_use(capacity: int, steps: list[tuple[str, bytes, int]]) -> None:
    index = TierIndex(capacity)
    model: list[tuple[bytes, int]] = []  # least recently used first
    for verb, key, size in steps:
        at = next((i for i, (known, _) in enumerate(model) if known == key), None)
        if verb == "use":
            assert index.use(key) == (at is not None)
            if at is not None:
                model.append(model.pop(at))
        elif verb == "drop":
            assert index.drop(key) == (at is not None)
            if at is not None:
                model.pop(at)
        elif at is None:
            evicted = index.admit(key, size)
            if size > capacity:
                assert evicted is None
            else:
                expected = []
                while sum(each for _, each in model) + size > capacity:
                    expected.append(model.pop(0)[0])
                assert evicted == expected
                model.append((key, size))
        index.check()
        assert index.used_bytes == sum(size for _, size in model)
        assert [key for key in KEYS if key in index] == sorted(key for key, _ in model)
        assert len(index) == len(model)


def test_the_prefix_cache_tells_what_is_used_deepest_first() -> None:
    pool = BlockPool(6, 2)
    prefix = PrefixCache(pool, b"revision 1")
    told: list[list[bytes]] = []
    prefix.on_use = lambda contents: told.append(list(contents))
    hashes, table = prefix.hashes([1, 2, 3, 4, 5, 6]), pool.allocate(3)
    prefix.publish(hashes, table, 0, 2)
    prefix.publish(hashes, table, 2, 2)
    prefix.publish(hashes, table, 2, 3)
    assert told == [[hashes[1], hashes[0]], [hashes[2]]]
    pool.release(prefix.match([1, 2, 3, 4, 9]))
    pool.release(prefix.match([9, 9, 9]))
    assert told[2:] == [[hashes[1], hashes[0]]]
