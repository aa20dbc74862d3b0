"""Labels from rows with the same content."""

from __future__ import annotations

from typing import Any

from guardreasoner_vl.sources.labels import known_labels
from guardreasoner_vl.types import Sample


def row(name: str, prompt: str, response: str | None = None, **fields: Any) -> Sample:
    content = {"id": name, "source": "toy", "modality": "text", "prompt": prompt, "response": response, **fields}
    return Sample.model_validate(content)


def test_the_same_content_gets_the_labels() -> None:
    known = known_labels(
        [
            row("a", "What is this?", "Bread.", request_label="unharmful", response_label="harmful"),
            row("b", "And this?", "Jam.", response_label="unharmful"),
            row("c", "not labelled", "Jam."),
        ]
    )
    applied = known.applied(row("x", " what IS\nthis? ", "bread."))
    assert (applied.id, applied.request_label, applied.response_label) == ("x", "unharmful", "harmful")
    assert applied.meta == {"labelled_by": "released corpus"}
    labelled = known.applied(row("y", "What is this?", "Bread.", response_label="unharmful"))
    assert (labelled.request_label, labelled.response_label) == ("unharmful", "unharmful")  # its own label stays
    assert known.applied(row("z", "And this?", "Jam.")).request_label is None


def test_other_content_gets_none() -> None:
    known = known_labels([row("a", "What is this?", "Bread.", request_label="harmful")])
    for other in (
        row("x", "What is this?"),
        row("x", "What is this?", "Cake."),
        row("x", "What is this?", "Bread.", images=("a.png",), modality="text-image"),
    ):
        assert known.applied(other) == other


def test_contradicting_labels_are_not_known() -> None:
    rows = [row(name, "same", request_label=label) for name, label in (("a", "harmful"), ("b", "unharmful"))]
    assert known_labels(rows).labels == {}
    assert len(known_labels([*rows[:1], rows[0]]).labels) == 1
