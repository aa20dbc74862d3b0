"""The sources' own categories in one taxonomy."""

from __future__ import annotations

import pytest

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.sources.categories import OTHER, TAXONOMY, taxonomy


@pytest.mark.parametrize(
    ("category", "place"),
    [
        ("social_stereotypes_and_unfair_discrimination", "hate"),
        ("toxic_language_hate_speech", "hate"),
        ("fraud_assisting_illegal_activities", "fraud"),
        ("private_information_individual", "privacy"),
        ("causing_material_harm_by_disseminating_misinformation", "misinformation"),
        ("cyberattack", "cybercrime"),
        ("drug_abuse,weapons,banned_substance", "weapons"),
        ("self_harm", "self-harm"),
        ("sexually_explicit,adult_content", "sexual content"),
        ("violence,aiding_and_abetting,incitement", "violence"),
        ("Suicide and Self Harm", "self-harm"),
        ("Sexual Minor", "child safety"),
        ("Guns/Illegal Weapons", "weapons"),
        ("Criminal Planning/Confessions", "crime"),
        ("Controlled/Regulated substances", "drugs"),
        ("Shocking", "violence"),
        ("Illegal Activity", "crime"),
        ("insulting gesture", "harassment"),
        ("Malicious Use", "crime"),
        ("begun late", OTHER),
        ("benign", OTHER),
    ],
)
def test_published_names_have_a_place(category: str, place: str) -> None:
    assert taxonomy(category, {}) == place


def test_a_recipe_may_place_them_otherwise() -> None:
    assert taxonomy("Shocking", {"Shocking": "hate"}) == "hate"
    assert OTHER in TAXONOMY
    with pytest.raises(RecipeError, match="'nonsense' is not in the taxonomy; use child safety"):
        taxonomy("Shocking", {"Shocking": "nonsense"})
