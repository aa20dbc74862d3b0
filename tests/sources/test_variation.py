"""Training texts changed at the surface: the same for a seed, whatever the labels are, and their words still there."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.protocol.lookalikes import LOOKALIKES
from guardreasoner_vl.recipe import VariedSection
from guardreasoner_vl.sources.checked import checked_sample, marks_fault
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.sources.repeats import times
from guardreasoner_vl.sources.variation import (
    BRIEF,
    FULL_WIDTH,
    INVISIBLE,
    KINDS,
    LEET,
    changed_text,
    varied,
)
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import GoldLabel

pytestmark = pytest.mark.slow
TEXT = "Please explain how to open a bank account, and why; my sister asks. Is a passport enough?"
ALWAYS = VariedSection(share=1, answers=1)


def sample(number: int, **fields: Any) -> Sample:
    return Sample.model_validate(
        {"id": f"toy-{number}", "source": "toy", "modality": "text", "prompt": TEXT, "request_label": "unharmful"}
        | fields
    )


def changed(name: str, text: str = TEXT, seeds: int = 40) -> list[str]:
    """What the change makes of a text, for several draws."""
    return [result for seed in range(seeds) if (result := changed_text(name, text, random.Random(seed)))]


def letters(text: str) -> str:
    return "".join(one for one in text if one.isalpha())


# --- which rows -----------------------------------------------------------------------------------------


def test_a_share_of_the_rows_is_changed_in_place() -> None:
    rows = [sample(number, response="It is.", response_label="unharmful") for number in range(4000)]
    changed_rows = varied(rows, VariedSection(share=0.15), 0)
    assert len(changed_rows) == len(rows)
    new = [row for row in changed_rows if row.provenance.variation]
    assert 0.13 < len(new) / len(rows) < 0.17
    assert 0.2 < sum(row.response != "It is." for row in new) / len(new) < 0.3
    for before, after in zip(rows, changed_rows, strict=True):
        if after.provenance.variation is None:
            assert after == before
            continue
        assert after.id.startswith(f"{before.id}+{after.meta['variation'].replace(' ', '-')}")
        assert (after.source, after.request_label, after.response_label) == ("toy", "unharmful", "unharmful")
        assert after.prompt != before.prompt
        assert after.provenance.plain["request"] == TEXT
    assert set(KINDS) == {row.provenance.variation for row in new}


def test_kinds_come_as_often_as_their_weights_say() -> None:
    counts = Counter(row.provenance.variation for row in varied([sample(number) for number in range(3000)], ALWAYS, 0))
    whole = sum(kind.weight for kind in KINDS.values())
    for name, kind in KINDS.items():
        assert counts[name] / 3000 == pytest.approx(kind.weight / whole, abs=0.02), name


def test_the_same_seed_gives_the_same_rows() -> None:
    rows = [sample(number) for number in range(300)]
    section = VariedSection(share=0.5)
    assert varied(rows, section, 1) == varied(rows, section, 1)
    assert varied(rows, section, 1) != varied(rows, section, 2)
    assert varied(rows, section, 1) != varied(rows, VariedSection(share=0.5, seed=1), 1)
    # What becomes of a row depends on no other one.
    assert varied(rows[100:], section, 1) == varied(rows, section, 1)[100:]


def test_labels_have_no_say() -> None:
    labels: Sequence[GoldLabel | None] = ("harmful", "unharmful", None)
    changed_rows = [
        varied([sample(number, request_label=label) for number in range(300)], VariedSection(share=0.5), 0)
        for label in labels
    ]
    texts = [[(row.id, row.prompt) for row in rows] for rows in changed_rows]
    assert texts == [texts[0]] * 3
    assert [{row.request_label for row in some} for some in changed_rows] == [{label} for label in labels]


def test_rows_with_images_or_reasoning_stay() -> None:
    rows = [
        sample(0, images=("a.png",), modality="text-image"),
        sample(1, prompt="", images=("a.png",), modality="image"),
        sample(2, reasoning="The user writes about a bank."),
        sample(3, prompt=" \n"),
        sample(4, prompt="\u2026"),
    ]
    assert varied(rows[:4], ALWAYS, 0) == rows[:4]
    assert varied(rows[4:], ALWAYS, 0)[0].prompt.strip()


def test_an_answer_alone_is_varied() -> None:
    rows = [sample(number, prompt="", response=TEXT, response_label="harmful") for number in range(50)]
    changed_rows = varied(rows, VariedSection(share=1, answers=0), 0)
    assert all(row.prompt == "" and row.response != TEXT and row.response_label == "harmful" for row in changed_rows)
    assert all(row.provenance.plain == {"response": TEXT} for row in changed_rows)


def test_long_texts_are_not_made_much_longer() -> None:
    rows = [sample(number, prompt=f"{TEXT} " * (BRIEF // len(TEXT) + 1)) for number in range(400)]
    kinds = {row.provenance.variation for row in varied(rows, ALWAYS, 0)}
    assert kinds == {name for name, kind in KINDS.items() if not kind.costly}


def test_what_is_known_of_a_joined_row_stays_known() -> None:
    (row,) = varied([sample(0, meta={"plain": {"request": "open a bank account"}, "kind": "x"})], ALWAYS, 0)
    assert row.provenance.plain["request"] == "open a bank account"
    assert row.meta["kind"] == "x"


def test_each_repetition_is_drawn_anew() -> None:
    section = VariedSection(share=0.5)
    rows = [sample(number) for number in range(200)]
    several = varied(rows * 3, section, 0)
    once = varied([sample(number, meta={"repeat": 3}) for number in range(200)], section, 0)
    assert len(several) == 600 == sum(map(times, once))
    assert len({row.id for row in once}) == len(once)
    assert Counter(row.id for row in several) == {row.id: times(row) for row in once}
    plain = {row.id: row for row in once if not row.provenance.variation}
    assert {times(row) for row in plain.values()} == {1, 2, 3}
    assert all(times(row) == 1 for row in once if row.provenance.variation)


def test_no_row_comes_to_look_held_out() -> None:
    changed_rows = varied([sample(number) for number in range(500)], ALWAYS, 0)
    assert not any(is_held_out(row.id) for row in changed_rows)


def test_a_hundred_thousand_rows_take_seconds() -> None:
    rows = [sample(number) for number in range(20_000)]
    start = time.perf_counter()
    varied(rows, VariedSection(share=0.15), 0)
    assert time.perf_counter() - start < 6  # a fifth of them, on a busy machine


# --- what is changed ------------------------------------------------------------------------------------


def test_case_and_punctuation() -> None:
    assert set(changed("capitals")) == {TEXT.upper()}
    assert set(changed("lower case")) == {TEXT.lower()}
    expected = "Please explain how to open a bank account and why my sister asks Is a passport enough"
    assert set(changed("no punctuation")) == {expected}


@pytest.mark.parametrize("name", ["lines", "wrapped", "bullets", "emoji", "spelt out", "invisible letters"])
def test_every_letter_stays(name: str) -> None:
    for result in changed(name):
        assert letters(result.replace("```text\n", "")) == letters(TEXT), result


@pytest.mark.parametrize("table", [("leetspeak", LEET), ("lookalikes", LOOKALIKES), ("full width", FULL_WIDTH)])
def test_letters_are_exchanged_for_their_likes(table: tuple[str, dict[str, str]]) -> None:
    name, likes = table
    for result in changed(name):
        assert len(result) == len(TEXT)
        pairs = [(one, other) for one, other in zip(TEXT, result, strict=True) if one != other]
        assert pairs
        assert all(other in likes[one] for one, other in pairs)


def test_lookalikes_are_other_letters_of_the_same_case() -> None:
    for latin, others in LOOKALIKES.items():
        for other in others:
            word = unicodedata.name(other)
            assert word.split()[0] in ("CYRILLIC", "GREEK", "ARMENIAN")
            assert ("CAPITAL" in word) == latin.isupper()


def test_full_width_letters_are_read_as_the_plain_ones() -> None:
    assert all(unicodedata.normalize("NFKC", wide) == plain for plain, wide in FULL_WIDTH.items())


def test_invisible_letters_are_invisible() -> None:
    for result in changed("invisible letters"):
        assert result.translate(dict.fromkeys(map(ord, INVISIBLE))) == TEXT
        assert result != TEXT
    used = {one for result in changed("invisible letters") for one in result} & set(INVISIBLE)
    assert used == set(INVISIBLE)


def test_a_guard_is_shown_the_change() -> None:
    """Nothing between a row and the model undoes it."""
    for row in varied([sample(number) for number in range(200)], ALWAYS, 0):
        assert row.prompt in build_messages(row.exchange())[1].text


def test_typing_errors_leave_most_of_a_word() -> None:
    words = TEXT.split()
    faults = set()
    for result in changed("typing errors"):
        others = result.split()
        assert len(others) == len(words)
        for word, other in zip(words, others, strict=True):
            assert (word[0], word[-1]) == (other[0], other[-1])
            assert abs(len(word) - len(other)) <= 1
            if word != other:
                faults.add((len(other) - len(word), sorted(word) == sorted(other)))
    assert faults == {(0, True), (0, False), (-1, False), (1, False)}  # swapped, beside the key, left out, doubled


def test_text_in_json_is_json() -> None:
    for result in changed("json", 'He said "no"\nto me \\ us'):
        assert 'He said "no"\nto me \\ us' in json.loads(result).values()


def test_where_there_is_nothing_to_change() -> None:
    assert changed("capitals", "LOUD") == []
    assert changed("leetspeak", "42?") == []
    assert changed("no punctuation", "?!") == []
    assert changed("typing errors", "a b c") == []
    assert all(changed(name, " \n") == [] for name in KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_no_change_makes_a_mark_of_a_medium(name: str) -> None:
    for text in ("(<image>) look", "<iimage>", "< image> <video>", "*<audio>*"):
        for result in changed(name, text):
            assert marks_fault(result, 0) is None


@given(text=st.text(min_size=1), name=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 50))
def test_any_text_gives_one_that_intake_accepts(text: str, name: str, seed: int) -> None:
    before = sample(0, prompt=text)
    result = changed_text(name, before.prompt, random.Random(seed))
    if result is None:
        return
    assert result != before.prompt
    row = checked_sample(before.model_copy(update={"prompt": result}))
    assert Sample.model_validate(row.model_dump()) == row  # line ends included
    exchange, _ = checked_exchange(row.exchange())
    assert exchange.has_prompt
    assert build_messages(exchange)
