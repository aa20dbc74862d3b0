"""Contrast pairs that the project writes: reproducible, of every kind, and told apart by nothing but their sense."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from itertools import chain
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.recipe import DataSection, MadeSection
from guardreasoner_vl.sources.categories import OTHER, TAXONOMY, taxonomy
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.mixture import build_mixture
from guardreasoner_vl.sources.synthetic.contrast import MAIN, write_folder
from guardreasoner_vl.sources.synthetic.contrast.answers import answered
from guardreasoner_vl.sources.synthetic.contrast.requests import SLOT, Request, filled, requested, spelt
from guardreasoner_vl.sources.synthetic.contrast.texts import Line, LineGroup, languages, lines

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from guardreasoner_vl.types import Sample

COUNT = 8000
KINDS = (
    "homonyms",
    "figurative language",
    "safe targets",
    "safe contexts",
    "definitions",
    "real discrimination of a nonsense group",
    "nonsense discrimination of a real group",
    "historical events",
    "privacy of public matters",
    "privacy of fictional characters",
    "harmful aims in harmless words",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return list(read_samples(write_folder(tmp_path_factory.mktemp("contrast"), COUNT, 0)))


def harmful_share(rows: Iterable[Sample]) -> float:
    labels = [row.request_label == "harmful" for row in rows]
    return sum(labels) / len(labels)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_folder(tmp_path / name, 50, seed)
    texts = {name: (tmp_path / name / "train.jsonl").read_bytes() for name in "abc"}
    assert texts["a"] == texts["b"] != texts["c"]


def test_patterns_of_every_kind_have_both_labels() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for code in languages():
        for kind, labels in lines(code).items():
            assert labels["harmful"], (code, kind)
            assert labels["unharmful"], (code, kind)
            for label, texts in labels.items():
                counts[code, label] += len(texts)
    assert set(KINDS) <= set(lines("en"))
    assert min(counts["en", "harmful"], counts["en", "unharmful"]) > 150
    assert 0.45 < counts["en", "harmful"] / (counts["en", "harmful"] + counts["en", "unharmful"]) < 0.55
    assert all(counts[code, "harmful"] + counts[code, "unharmful"] >= 80 for code in MAIN)


def test_no_pattern_occurs_twice() -> None:
    for code, language in languages().items():
        texts = [(text, group.kind) for group in language.groups for text in (*group.harmless, *_flat(group))]
        assert [text for text, times in Counter(texts).items() if times > 1] == [], code


def _flat(group: LineGroup) -> tuple[str, ...]:
    return tuple(chain.from_iterable(group.harmful.values()))


def test_every_slot_has_words_and_every_frame_a_place() -> None:
    for language in languages().values():
        for frame in (*language.verb, *language.sentence, *language.lead_verb, *language.refuse_verb):
            assert frame.count("{x}") == 1, frame
        for group in language.groups:
            slots = {**language.slots, **group.slots}
            answers = (*group.answers, *chain.from_iterable(group.bad_answers.values()))
            for text in (*group.harmless, *_flat(group), *answers, *chain.from_iterable(slots.values())):
                assert set(SLOT.findall(text)) <= set(slots), text
            assert all(words == tuple(dict.fromkeys(words)) for words in group.slots.values())


@pytest.mark.slow
def test_rows_hold_what_they_say(rows: list[Sample]) -> None:
    assert len({row.id for row in rows}) == COUNT
    for row in rows:
        row.exchange()
        assert row.modality == "text"
        assert (row.response is None) == (row.response_label is None)
        harmful = "harmful" in (row.request_label, row.response_label)
        assert bool(row.meta.get("category")) == harmful
        for text in (row.prompt, row.response or ""):
            assert text == text.strip()
            assert not SLOT.search(text), text
    assert 0.45 <= harmful_share(rows) <= 0.5
    answers = [row for row in rows if row.response]
    assert 0.37 < len(answers) / COUNT < 0.43
    for label, low, high in (("harmful", 0.4, 0.5), ("unharmful", 0.15, 0.25)):
        labels = [row.response_label == "harmful" for row in answers if row.request_label == label]
        assert low < sum(labels) / len(labels) < high


def test_few_prompts_are_repeated(rows: list[Sample]) -> None:
    assert 1 - len({row.prompt for row in rows}) / COUNT < 0.03


def test_neither_language_nor_kind_nor_length_tells_the_label(rows: list[Sample]) -> None:
    for key, low in (("language", 0.35), ("kind", 0.35)):
        parts = defaultdict(list)
        for row in rows:
            parts[row.meta[key]].append(row)
        for name, part in parts.items():
            if len(part) >= 200:
                assert low < harmful_share(part) < 0.95 - low, name
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    for start in range(0, COUNT, COUNT // 4):
        assert 0.4 < harmful_share(by_length[start : start + COUNT // 4]) < 0.6, start


def test_the_first_word_does_not_tell_the_label(rows: list[Sample]) -> None:
    openings = defaultdict(list)
    for row in rows:
        openings[re.split(r"\W+", row.prompt.casefold().lstrip("¿¡"))[0]].append(row)
    common = {word: part for word, part in openings.items() if len(part) >= 100}
    assert len(common) > 8
    for word, part in common.items():
        assert 0.25 < harmful_share(part) < 0.75, word


def test_a_third_of_the_rows_is_not_english(rows: list[Sample]) -> None:
    counts = Counter(row.meta["language"] for row in rows)
    others = [code for code in languages() if code not in ("en", *MAIN)]
    assert 0.12 < sum(counts[code] for code in MAIN) / COUNT < 0.15
    assert 0.15 < sum(counts[code] for code in others) / COUNT < 0.18
    assert min(counts[code] for code in MAIN) > 200
    assert min(counts[code] for code in others) > 40


def test_every_category_has_a_place() -> None:
    categories = {
        category for language in languages().values() for group in language.groups for category in group.harmful
    }
    for language in languages().values():
        categories.update(language.worse, *(group.bad_answers for group in language.groups))
    places = {category: taxonomy(category, {}) for category in categories}
    assert [category for category, place in places.items() if place == OTHER] == []
    assert set(places.values()) == set(TAXONOMY) - {OTHER}
    for language in languages().values():
        for parts in (language.support, language.comply):
            assert set(parts) - {"any"} <= set(TAXONOMY)


def test_a_phrase_is_put_into_a_frame_and_a_sentence_is_not() -> None:
    language = languages()["en"]
    rng = random.Random(0)
    phrase = Line("grill a trout", "", LineGroup(kind="toy"))
    texts = [requested(rng, phrase, language) for _ in range(100)]
    assert all("grill a trout" in request.text.casefold() for request in texts)
    assert len({request.text.casefold() for request in texts}) > 50
    sentence = Line("Who grills trout?", "", LineGroup(kind="toy"))
    assert all(requested(rng, sentence, language).topic == "" for _ in range(20))
    alone = Line("grill a trout", "", LineGroup(kind="toy", framed=False))
    assert {requested(rng, alone, language).text.casefold() for _ in range(50)} == {"grill a trout"}


def test_secrecy_is_added_only_where_it_harms_no_harmless_line() -> None:
    language = languages()["en"]
    for stealth in (True, False):
        line = Line("grill a trout", "", LineGroup(kind="toy", stealth=stealth))
        rng = random.Random(0)
        texts = [requested(rng, line, language).text.casefold() for _ in range(300)]
        assert any(tail in text for text in texts for tail in language.stealth) == stealth


def test_slots_of_words_are_filled_too() -> None:
    slots = {"who": ("the mayor of {city}",), "city": ("Cork",)}
    assert filled(random.Random(0), "ask {who}", slots) == "ask the mayor of Cork"


def test_spelling_never_empties_a_text() -> None:
    rng = random.Random(0)
    assert {spelt(rng, "Why?") for _ in range(200)} == {"Why?", "why?", "Why", "why"}
    assert all(spelt(rng, "?") == "?" for _ in range(100))


def test_answers_speak_to_the_one_who_asked() -> None:
    language = languages()["en"]
    line = Line("greet {person}", "", LineGroup(kind="toy"))
    request = Request("How do I greet my boss?", "greet my boss", line, language)
    rng = random.Random(0)
    texts = {answered(rng, request).text for _ in range(200)}
    assert any("greet your boss" in text for text in texts)
    assert not any("greet my boss" in text for text in texts)


def test_a_refusal_that_turns_into_help_is_harmful() -> None:
    language = languages()["en"]
    line = Line("rob a bank", "crime", LineGroup(kind="toy"))
    request = Request("rob a bank", "rob a bank", line, language)
    rng = random.Random(0)
    answers = [answered(rng, request) for _ in range(400)]
    turned = [answer for answer in answers if any(turn in answer.text for turn in language.turn)]
    refusals = [answer for answer in answers if answer.label == "unharmful"]
    assert len(turned) > 30
    assert all(answer.label == "harmful" for answer in turned)
    assert all(not any(part in answer.text for part in language.comply["crime"]) for answer in refusals)


def test_most_bad_answers_fit_the_matter() -> None:
    group = LineGroup(kind="toy", bad_answers={"crime": ("Steal it from {group}.",)})
    request = Request("buy a bike", "buy a bike", Line("buy a bike", "", group), languages()["en"])
    rng = random.Random(0)
    bad = [answer for answer in (answered(rng, request) for _ in range(500)) if answer.label == "harmful"]
    fitting = [answer for answer in bad if "Steal it from" in answer.text]
    assert 0.6 < len(fitting) / len(bad) < 0.9
    assert {answer.category for answer in fitting} == {"crime"}


def test_a_recipe_takes_them(tmp_path: Path) -> None:
    data = DataSection(contrast=MadeSection(count=200, test_share=0.3, repeat=2))
    mixture = build_mixture(data, tmp_path, tmp_path / "work", 0)
    assert {row.source for row in mixture.train} == {"contrast"}
    assert 35 < len(mixture.test) < 85
    assert len(mixture.train) / 2 + len(mixture.held_out) + len(mixture.test) == 200
    harmful = [row for row in mixture.train if row.request_label == "harmful"]
    assert harmful
    assert all(row.meta["taxonomy"] in TAXONOMY for row in harmful)
