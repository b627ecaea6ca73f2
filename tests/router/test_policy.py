"""Placement is a pure function of the views: least work first, ties by id, never to a worker that cannot hold it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.policy import (
    BACKLOG_STEPS,
    DecodeView,
    MoveView,
    PrefillView,
    choose_move,
    choose_prefill,
    decode_prefills,
    rank_decode,
)

prefill_views = st.lists(
    st.builds(
        PrefillView,
        worker_id=st.sampled_from([f"p{i}" for i in range(6)]),
        charged_tokens=st.integers(0, 300),
        reported_tokens=st.integers(0, 300),
        max_step_tokens=st.sampled_from([1, 7, 64, 123]),
        longest_tokens=st.integers(1, 500),
    ),
    unique_by=lambda view: view.worker_id,
)
decode_views = st.lists(
    st.builds(
        DecodeView,
        worker_id=st.sampled_from([f"d{i}" for i in range(6)]),
        charged_tokens=st.integers(0, 300),
        reported_tokens=st.integers(0, 300),
        capacity_tokens=st.integers(1, 500),
        longest_tokens=st.integers(1, 500),
    ),
    unique_by=lambda view: view.worker_id,
)


@given(prefill_views, st.integers(1, 500), st.randoms())
def test_prefill_goes_to_the_least_loaded_that_fits(views, total_tokens, shuffler) -> None:  # type: ignore[no-untyped-def]
    chosen = choose_prefill(views, total_tokens)
    outstanding = {v.worker_id: max(v.charged_tokens, v.reported_tokens) for v in views}
    allowed = [
        v
        for v in views
        if v.longest_tokens >= total_tokens
        and (outstanding[v.worker_id] == 0 or outstanding[v.worker_id] < BACKLOG_STEPS * v.max_step_tokens)
    ]
    if not allowed:
        assert chosen is None
        return
    least = min(outstanding[v.worker_id] for v in allowed)
    assert outstanding[chosen] == least
    assert chosen == min(v.worker_id for v in allowed if outstanding[v.worker_id] == least)
    shuffled = list(views)
    shuffler.shuffle(shuffled)
    assert choose_prefill(shuffled, total_tokens) == chosen


@given(decode_views, st.integers(1, 500))
def test_decode_is_asked_emptiest_first(views, total_tokens) -> None:  # type: ignore[no-untyped-def]
    ranked = rank_decode(views, total_tokens)
    by_id = {v.worker_id: v for v in views}
    assert set(ranked) == {v.worker_id for v in views if v.longest_tokens >= total_tokens}
    keys = [(max(by_id[w].charged_tokens, by_id[w].reported_tokens) / by_id[w].capacity_tokens, w) for w in ranked]
    assert keys == sorted(keys)
    for keeper in ranked:
        assert rank_decode(views, total_tokens, keeper) == [keeper, *(each for each in ranked if each != keeper)]


def test_an_idle_prefill_worker_takes_a_prompt_of_any_length() -> None:
    idle = PrefillView("p0", charged_tokens=0, reported_tokens=0, max_step_tokens=7, longest_tokens=1000)
    assert choose_prefill([idle], 1000) == "p0"
    assert choose_prefill([idle], 1001) is None


def test_what_other_routers_placed_counts() -> None:
    ours, theirs = PrefillView("p0", 40, 0, 64, 1000), PrefillView("p1", 0, 50, 64, 1000)
    assert choose_prefill([ours, theirs], 10) == "p0"
    assert choose_prefill([theirs], 10) == "p1"
    assert choose_prefill([PrefillView("p1", 0, BACKLOG_STEPS * 64, 64, 1000)], 10) is None


def test_decode_prefills_only_where_nobody_else_can_unless_told() -> None:
    idle, busy = DecodeView("d0", 0, 0, 100, 100), DecodeView("d1", 0, 5, 100, 100)
    assert decode_prefills(0, 42, busy, up_to_tokens=0)
    assert not decode_prefills(1, 1, idle, up_to_tokens=0)
    assert decode_prefills(1, 42, idle, up_to_tokens=42)
    assert not decode_prefills(1, 43, idle, up_to_tokens=42)
    assert not decode_prefills(1, 42, busy, up_to_tokens=42)


move_views = decode_views.flatmap(
    lambda views: st.tuples(
        *(
            st.builds(
                MoveView,
                decode=st.just(view),
                is_short=st.booleans(),
                sequences=st.lists(st.tuples(st.integers(1, 200), st.sampled_from("abcdef")), max_size=3).map(tuple),
            )
            for view in views
        )
    )
)


@given(move_views, st.randoms())
def test_a_move_never_makes_another_worker_the_full_one(views, shuffler) -> None:  # type: ignore[no-untyped-def]
    move = choose_move(views)
    by_id = {view.decode.worker_id: view for view in views}
    if move is None:
        return
    source, target = by_id[move.source], by_id[move.target]
    assert source.is_short and not target.is_short
    tokens, sequence_id = min(source.sequences)
    assert move.sequence_id == sequence_id
    fill = (target.decode.held_tokens + tokens) / target.decode.capacity_tokens
    assert fill < 0.7 and fill <= source.decode.fill - 0.2
    assert all(other.is_short or other.decode.fill >= target.decode.fill for other in views)
    back = [
        MoveView(
            _with(view, tokens if view is target else -tokens if view is source else 0), view is target, ((1, "x"),)
        )
        for view in views
    ]
    returned = choose_move(back)
    assert returned is None or returned.target != move.source or by_id[move.source].decode.fill > 0.9
    shuffled = list(views)
    shuffler.shuffle(shuffled)
    assert choose_move(shuffled) == move


def _with(view: MoveView, tokens: int) -> DecodeView:
    held = max(view.decode.held_tokens + tokens, 0)
    return DecodeView(view.decode.worker_id, held, held, view.decode.capacity_tokens, view.decode.longest_tokens)


def test_who_moves_where() -> None:
    def view(name: str, held: int, is_short: bool = False, *sequences: tuple[int, str]) -> MoveView:
        return MoveView(DecodeView(name, held, 0, 100, 100), is_short, sequences)

    full = view("d0", 95, True, (40, "long"), (20, "short"))
    assert choose_move([full, view("d1", 30), view("d2", 10)]) == ("short", "d0", "d2")
    assert choose_move([full, view("d1", 55)]) is None, "then it would be that one's turn"
    assert choose_move([full, view("d1", 10, True)]) is None
    assert choose_move([view("d0", 95, True), view("d1", 10)]) is None, "nothing of ours runs there"
    assert choose_move([view("d0", 95, False, (20, "short")), view("d1", 10)]) is None
