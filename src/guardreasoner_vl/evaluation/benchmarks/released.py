"""The test set as the paper's authors released it: hub data set `yueliu1999/GuardReasoner-VLTest`.

Text sets are lists of `{instruction, input, output}`, image sets of `{messages, images}`; the gold labels
stand in `output`, or in the assistant's message, bare or behind `Request:` and `Response:`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.benchmarks.base import Layout
from guardreasoner_vl.protocol.messages import parse_released_input
from guardreasoner_vl.sources.adapters import NotASampleError, Place, picture_of, text_of
from guardreasoner_vl.types import GoldLabel, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.evaluation.benchmarks.base import Judged
    from guardreasoner_vl.sources.adapters import ToSample
    from guardreasoner_vl.sources.records import Record
    from guardreasoner_vl.types import Modality

_FIELD = {
    target: re.compile(rf"^\s*{target}:\s*(\S+)\s*$", re.IGNORECASE | re.MULTILINE)
    for target in ("request", "response")
}
_GOLD: dict[str, GoldLabel] = {"harmful": "harmful", "unharmful": "unharmful", "harmless": "unharmful"}
_ABSENT = ("", "none", "null")


def released(file: str, judged: Judged, modality: Modality) -> Layout:
    """The layout of `test/FILE.json`."""
    return Layout(f"test/{file}.json", _to_sample(judged, modality))


def gold_labels(text: str) -> tuple[GoldLabel | None, GoldLabel | None]:
    """Request and response labels of the authors' form `Request: ...`; raises `NotASampleError`."""
    return _gold(text, "request", ()), _gold(text, "response", ())


def _to_sample(judged: Judged, modality: Modality) -> ToSample:
    def to_sample(record: Record, place: Place) -> Sample:
        asked, gold, images = _parts(record, place)
        try:
            exchange = parse_released_input(asked, images)
        except InputError as error:
            raise NotASampleError("not the released layout") from error
        bare: tuple[Literal["request", "response"], ...] = (
            ("request",) if judged == "prompt" else ("response",) if judged == "response" else ()
        )
        return Sample(
            id=place.id,
            source=place.name,
            split="test",
            modality=modality,
            prompt=exchange.prompt or "",
            images=tuple(images),
            response=exchange.response,
            request_label=_gold(gold, "request", bare) if judged != "response" else None,
            response_label=_gold(gold, "response", bare) if judged != "prompt" else None,
        )

    return to_sample


def _parts(record: Record, place: Place) -> tuple[str, str, Sequence[str]]:
    """What was asked, the text that holds the labels, and the pictures' paths."""
    messages = record.get("messages")
    if messages is None:
        output = record.get("output")
        return text_of(record, "input"), output if isinstance(output, str) else "", ()
    by_role = {message.get("role"): message for message in messages if isinstance(message, dict)}
    if "user" not in by_role or "assistant" not in by_role:
        raise NotASampleError("no user and assistant message")
    images = [picture_of(place, str(name)) for name in record.get("images") or ()]
    return text_of(by_role["user"], "content"), text_of(by_role["assistant"], "content"), images


def _gold(text: str, target: Literal["request", "response"], bare: Sequence[str]) -> GoldLabel | None:
    """The label of one target; None where it is missing."""
    found = _FIELD[target].findall(text)
    if len(found) > 1:
        raise NotASampleError(f"several {target} labels")
    word = (found[0] if found else text.strip() if target in bare and ":" not in text else "").strip().lower()
    if word in _ABSENT:
        return None
    if word not in _GOLD:
        raise NotASampleError(f"label {word!r:.30} is none of {', '.join(_GOLD)}")
    return _GOLD[word]
