"""Text that comes in pieces is the text decoded whole, cut where the first complete stop string begins."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.text import AnswerText, StopBuffer
from service.tokenizer import Tokenizer

letters = st.text(alphabet="abc€😀 ", max_size=40)
stop_strings = st.lists(st.text(alphabet="abc€😀", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, str]:
    """The oracle, character by character: the text ends where a stop string is complete, the longest one first."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, ""


def could_begin_a_stop(text: str, stops: list[str]) -> bool:
    return any(stop.startswith(text[at:]) for stop in stops for at in range(len(text)))


@given(letters, stop_strings, st.lists(st.integers(0, 40), max_size=12))
@example("aab", ["ab"], [1, 2])
@example("abcd", ["abcd", "c"], [])
def test_stop_strings_across_any_borders(text: str, stops: list[str], borders: list[int]) -> None:
    cuts = sorted({0, len(text), *(min(border, len(text)) for border in borders)})
    buffer, given_out, found = StopBuffer(stops), "", ""
    for start, end in itertools.pairwise(cuts):
        piece, found = buffer.push(text[start:end])
        given_out += piece
        if found:
            break
        held = text[len(given_out) : end]
        assert text[:end] == given_out + held
        assert not held or could_begin_a_stop(held, stops), "held back without need"
    assert (given_out + ("" if found else buffer.rest()), found) == cut(text, stops)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 262), max_size=30), stop_strings, st.text(alphabet="the and in 😀€ü", max_size=12))
def test_an_answer_token_by_token(tokenizer: Tokenizer, noise: list[int], stops: list[str], text: str) -> None:
    """Random bytes with real text among them: half characters, broken ones, special tokens, merges."""
    token_ids = noise[: len(noise) // 2] + tokenizer.encode(text) + noise[len(noise) // 2 :]
    answer, given_out, used = AnswerText(tokenizer.stream(), stops), "", 0
    for token_id in token_ids:
        given_out += answer.push(token_id)
        used += 1
        if answer.stop_string:
            break
    given_out += answer.finish()
    assert (given_out, answer.stop_string) == cut(
        tokenizer.decode(token_ids[:used] if answer.stop_string else token_ids), stops
    )


def test_an_emoji_leaves_whole(tokenizer: Tokenizer) -> None:
    answer = AnswerText(tokenizer.stream(), [])
    assert [answer.push(byte) for byte in "😀".encode()] == ["", "", "", "😀"]
