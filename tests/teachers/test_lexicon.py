"""Which words the rules teacher takes for evidence, where it finds them, and everyday topics."""

import pytest

from guardreasoner_vl.teachers.lexicon import CATEGORIES, INFLECTED, TOPICS, WHOLE, Evidence, find_evidence, find_topic


@pytest.mark.parametrize(
    ("text", "category", "start"),
    [
        ("two bombs", "weapons", 4),
        ("How to BOMB it", "weapons", 7),
        ("HACKING a phone", "cybercrime", 0),
        ("a computer virus", "cybercrime", 2),
        ("they robbed it", "theft", 5),
        ("a robbery", "theft", 2),
        ("he steals it", "theft", 3),
        ("forged and forgery", "fraud", 0),
        ("he killed it", "violence", 3),
        ("I want to end my life", "self-harm", 10),
        ("racist talk", "hate", 0),
        ("just shut up", "harassment", 5),
        ("İ drugs", "drugs", 2),
    ],
)
def test_inflected_words_are_found_where_they_stand(text: str, category: str, start: int) -> None:
    assert find_evidence(text) == Evidence(category, start)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "translate this",
        "a drugstore",
        "danish pastry with my friend Dan",
        "begun",
        "skill",
        "a methodical man",
        "forget it",
        "a stealth plane",
        "the heroine of the book",
        "Crimea",
        "a punchline",
        "shut the window",
        "take out the trash",
        "black coffee and white bread",
        "ignore the noise",
        "a virus in the nose",
        "women vote",
    ],
)
def test_other_words_are_no_evidence(text: str) -> None:
    assert find_evidence(text) is None


def test_the_most_telling_category_wins_and_then_the_first_word() -> None:
    assert find_evidence("a fake gun and a bomb") == Evidence("weapons", 7)
    assert find_evidence("he is stupid and wants to kill") == Evidence("violence", 26)


def test_every_stem_finds_its_own_category() -> None:
    for category, stems in CATEGORIES.items():
        for stem in stems.split():
            for word in (stem, stem.replace("-", " ")):
                assert find_evidence(f"so {word} it is") == Evidence(category, 3), stem
    assert {*INFLECTED, *WHOLE} <= {stem for stems in CATEGORIES.values() for stem in stems.split()}


@pytest.mark.parametrize(
    ("text", "topic"),
    [
        ("How do I bake bread?", "food"),
        ("Two dogs and a recipe for cat food and a dog bowl", "animals"),
        ("my doctors", "health"),
        ("GOD", "religion"),
        ("why do women wait", "people"),
        ("what caused it", None),
        ("a cartoon about petty lawns", None),
        ("", None),
    ],
)
def test_the_topic_with_most_words(text: str, topic: str | None) -> None:
    assert find_topic(text) == topic


def test_every_word_of_a_topic_finds_it_and_no_word_has_two() -> None:
    for topic, words in TOPICS.items():
        for word in words.split():
            assert find_topic(f"so {word.rstrip('*')} it is") == topic, word
