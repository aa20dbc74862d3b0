"""Which words are quoted: few, around the telling one, as they stand in the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.teachers.lexicon import Evidence, find_evidence
from guardreasoner_vl.teachers.quoting import first_words, telling_words

PIECES = st.lists(st.sampled_from(("bomb", "kill", "a", "to", "of", "train", "x.", "'kill", "b-b", "\n", "<b>", "é")))


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("how to make a bomb at home", "make a bomb"),
        ("how do I kill a python process", "kill a python"),
        ("I want to kill it", "kill"),
        ("buy cocaine online now", "buy cocaine online"),
        ("plant the very big old bomb", "old bomb"),
        ("build a bomb with a timer", "build a bomb"),
        ("make a bomb vest today", "make a bomb vest"),
        ("make a bomb the easy way", "make a bomb"),
        ("a b c, then: a kill-switch", "kill-switch"),
        ("just shut up, will you", "shut up"),
        ("(kill)", "kill"),
        ("RT @kill", None),
        ("a bomb<br>", None),
    ],
)
def test_the_quote_holds_the_telling_word_and_what_gives_it_meaning(text: str, quoted: str | None) -> None:
    evidence = find_evidence(text)
    assert evidence is not None
    assert telling_words(text, evidence, 4) == quoted


def test_a_shorter_quote() -> None:
    text = "make a bomb vest today"
    assert telling_words(text, Evidence("weapons", text.index("bomb")), 3) == "make a bomb"
    assert telling_words(text, Evidence("weapons", text.index("bomb")), 1) == "bomb"


@given(PIECES, st.integers(1, 4))
def test_a_quote_is_in_the_text_word_for_word(pieces: list[str], most: int) -> None:
    text = " ".join(pieces)
    evidence = find_evidence(text)
    quoted = telling_words(text, evidence, most) if evidence else None
    assert quoted is None or f" {quoted} " in f" {text} ".translate(str.maketrans(".'\n", "   "))
    assert quoted is None or 1 <= len(quoted.split(" ")) <= most


@pytest.mark.parametrize(
    ("text", "most", "kept"),
    [
        ("one  two\nthree four", 3, "one two three"),
        ('say "cheese" now', 2, "say cheese"),
        ("a" * 100, 8, "a" * 14),
        ("short " + "b" * 60, 8, "short"),
        ("\u4eca" * 40, 8, "\u4eca" * 14),
        ("", 8, ""),
    ],
)
def test_the_first_words_cost_little(text: str, most: int, kept: str) -> None:
    assert first_words(text, most) == kept
