"""Which words the rules teacher takes for evidence, and where it finds them."""

import pytest

from guardreasoner_vl.teachers.lexicon import CATEGORIES, Evidence, find_evidence


@pytest.mark.parametrize(
    ("text", "category", "start"),
    [
        ("two bombs", "weapons", 4),
        ("HACKING a phone", "cybercrime", 0),
        ("they robbed it", "theft", 5),
        ("a robbery", "theft", 2),
        ("forged and forgery", "fraud", 0),
        ("he killed it", "violence", 3),
        ("racist talk", "hate", 0),
        ("trans people", "hate", 0),
        ("İ drugs", "drugs", 2),
    ],
)
def test_inflected_words_are_found_where_they_stand(text: str, category: str, start: int) -> None:
    assert find_evidence(text) == Evidence(category, start)


@pytest.mark.parametrize(
    "text", ["", "translate this", "a drugstore", "danish pastry", "begun", "skill", "a methodical man", "forget it"]
)
def test_other_words_are_left_alone(text: str) -> None:
    assert find_evidence(text) is None


def test_the_most_telling_category_wins_and_then_the_first_word() -> None:
    assert find_evidence("a fake gun and a bomb") == Evidence("weapons", 7)


def test_every_stem_finds_itself_in_its_own_category() -> None:
    for category, stems in CATEGORIES.items():
        for stem in stems.split():
            found = find_evidence(stem)
            assert found is not None, stem
            assert found.category == category
