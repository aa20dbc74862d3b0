"""Renamed keys of settings."""

from __future__ import annotations

from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from guardreasoner_vl.recipe.unknown import first_problem


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    renamed_keys: ClassVar[dict[str, str]] = {"old": "new"}
    new: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner = Inner()
    several: list[Inner] = []
    named: dict[str, Inner] = {}
    old: int = 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner": {"old": 2}}, "'inner.old' was renamed: write 'inner.new'"),
        ({"several": [{}, {"old": 2}]}, "'several.1.old' was renamed: write 'several.1.new'"),
        ({"named": {"a": {"old": 2}}}, "'named.a.old' was renamed: write 'named.a.new'"),
        ({"inner": {"new": "x", "old": 2}}, "'inner.old' was renamed: write 'inner.new'"),
        ({"inner": {"other": 2}}, "unknown key 'inner.other'; remove it"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(settings)
    assert first_problem(caught.value.errors(), Outer, "the settings") == message


def test_the_old_name_may_be_a_key_of_another_section() -> None:
    assert Outer.model_validate({"old": 2}).old == 2
