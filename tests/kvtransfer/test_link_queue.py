"""Who shares a link: bounded in flight, turns by bytes, nearer deadlines first, and nobody starves."""

from __future__ import annotations

import collections

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.link_queue import LinkQueue


class Link:
    """Drives a queue: every hand-over asks again as soon as it may write, `slack_s[name]` from its deadline."""

    def __init__(self, window: int, handoff: int, slack_s: dict[str, float], nbytes: dict[str, int]) -> None:
        self.queue, self.handoff, self.window = LinkQueue(window, handoff), handoff, window
        self.slack_s, self.nbytes = slack_s, nbytes
        self.out: collections.deque[str] = collections.deque()
        self.written: collections.Counter[str] = collections.Counter()
        for name in slack_s:
            self.queue.ask(name, nbytes[name], slack_s[name])

    def let(self) -> None:
        while (name := self.queue.next()) is not None:
            self.out.append(name)
            held = collections.Counter(self.out)
            own, total = held[name] * self.nbytes[name], sum(self.nbytes[each] for each in self.out)
            assert own <= self.handoff or held[name] == 1
            assert total <= self.window or len(self.out) == 1
            self.queue.ask(name, self.nbytes[name], self.slack_s[name])

    def run(self, writes: int) -> collections.Counter[str]:
        for _ in range(writes):
            self.let()
            name = self.out.popleft()
            self.queue.landed(name, self.nbytes[name])
            self.written[name] += self.nbytes[name]
        return self.written


def test_equal_deadlines_share_by_bytes_whatever_the_size_of_their_writes() -> None:
    written = Link(40, 20, dict.fromkeys("abc", 5.0), {"a": 1, "b": 4, "c": 16}).run(2000)
    assert max(written.values()) <= 1.1 * min(written.values())


def test_half_the_time_left_is_twice_the_share() -> None:
    written = Link(8, 4, {"soon": 1.0, "late": 2.0, "last": 4.0}, dict.fromkeys(("soon", "late", "last"), 1)).run(1400)
    assert [round(written[name] / 200) for name in ("soon", "late", "last")] == [4, 2, 1]


def test_of_two_that_wait_the_nearer_deadline_is_first() -> None:
    queue = LinkQueue(10, 10)
    queue.ask("first", 10, 1.0)
    assert queue.next() == "first"
    queue.ask("late", 10, 60.0)
    queue.ask("soon", 10, 2.0)
    assert queue.next() is None
    queue.landed("first", 10)
    assert queue.next() == "soon"


def test_who_was_idle_has_saved_nothing_up() -> None:
    link = Link(1, 1, {"busy": 1.0, "idle": 1.0}, {"busy": 1, "idle": 1})
    link.queue.withdraw("idle")
    link.run(500)
    link.queue.ask("idle", 1, 1.0)
    before = dict(link.written)
    link.run(100)
    assert abs(link.written["idle"] - 50) <= 2
    assert abs(link.written["busy"] - before["busy"] - 50) <= 2


def test_one_that_does_not_land_holds_up_its_own_and_no_more_of_the_window_than_it_has() -> None:
    queue = LinkQueue(8, 4)
    for _ in range(4):
        queue.ask("stuck", 1, 1.0)
        assert queue.next() == "stuck"
    queue.ask("stuck", 1, 1.0)
    assert queue.next() is None
    for _ in range(100):
        queue.ask("other", 4, 100.0)
        assert queue.next() == "other"
        queue.landed("other", 4)
    assert queue.in_flight_bytes == 4


def test_a_write_larger_than_the_window_goes_alone_and_small_ones_do_not_pass_it() -> None:
    queue = LinkQueue(8, 4)
    queue.ask("small", 2, 1.0)
    assert queue.next() == "small"
    queue.ask("large", 100, 0.01)
    queue.ask("other", 1, 100.0)
    assert queue.next() is None
    queue.landed("small", 2)
    assert queue.next() == "large"
    assert queue.next() is None
    queue.landed("large", 100)
    assert queue.next() == "other"


@given(
    st.integers(1, 10),
    st.integers(1, 10),
    st.lists(st.tuples(st.floats(1, 10), st.integers(1, 6)), min_size=1, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_nothing_is_left_and_nobody_starves(window: int, handoff: int, flows: list[tuple[float, int]]) -> None:
    names = [str(number) for number in range(len(flows))]
    slack_s = {name: slack for name, (slack, _) in zip(names, flows, strict=True)}
    link = Link(window, handoff, slack_s, {name: nbytes for name, (_, nbytes) in zip(names, flows, strict=True)})
    link.run(2 * 10 * 6 * len(flows))  # the least share is a tenth, in writes six times as large
    assert set(link.written) == set(names)
    while link.out:
        name = link.out.popleft()
        link.queue.landed(name, link.nbytes[name])
    for name in names:
        link.queue.forget(name)
    assert link.queue.in_flight_bytes == 0
