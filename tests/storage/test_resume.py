"""A run's inputs: written once, compared after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.storage.resume import changed_keys, check_inputs, read_inputs

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a"]),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, ["a.c"]),
        ({"a": {"b": 1}}, {"a": None}, ["a"]),
        ({"a": [1]}, {"a": [1, 2]}, ["a"]),
        ({}, {"a": None}, []),
        ({}, {"b": 1}, ["b"]),
        ({"b": 1}, {}, ["b"]),
    ],
)
def test_changed_keys(old: Any, new: Any, expected: list[str]) -> None:
    assert changed_keys(old, new) == expected


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.json"
    check_inputs(path, "a survey", {"seed": 1, "model": {"name": "m", "limits": (1, 2)}, "count": 5})
    return path


def test_equal_inputs_and_free_keys_are_accepted(path: Path) -> None:
    check_inputs(path, "a survey", {"seed": 1, "model": {"name": "m", "limits": [1, 2]}, "count": 7}, free=("count",))
    assert read_inputs(path)["count"] == 7


def test_changed_inputs_are_refused_by_name_and_stay_as_they_were(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(DataError) as caught:
        check_inputs(path, "a survey", {"seed": 2, "model": {"name": "n", "limits": (1, 2)}, "count": 5})
    assert str(caught.value) == (
        f"{path.parent} holds a survey with other inputs (changed: model.name, seed); restore them or name a new output"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_a_file_that_cannot_be_read(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"inputs\.json: cannot be read; restore it, or name a new output"):
        check_inputs(path, "a survey", {"seed": 1})
    assert path.read_bytes() == content


def test_the_file_is_json_that_a_person_can_read(path: Path) -> None:
    assert json.loads(path.read_text())["model"] == {"name": "m", "limits": [1, 2]}
