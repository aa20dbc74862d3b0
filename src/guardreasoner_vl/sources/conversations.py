"""Read `Sample`s from published conversations in which a guard is asked and answers.

The user message is the protocol's transcript, the assistant message holds reasoning and labels in its grammar. An
extra key `sample` may hold further fields of `Sample`, which override what was read from the messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.protocol import IMAGE, parse_released_input, parse_verdict
from guardreasoner_vl.sources.adapters import RecordContext, image_of, modality_of, text_field
from guardreasoner_vl.sources.checked import field_fault
from guardreasoner_vl.sources.records import NotASampleError, Record, SourceRow, read_records
from guardreasoner_vl.types import GoldLabel, Label, Sample, Target
from guardreasoner_vl.types.media import marks, unread_medium

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
_TEXTS = ("prompt", "response")
_LABELS = ("request_label", "response_label")
_ODD_FIELDS = "its 'sample' does not hold fields of a sample"
_DATASET_INFO = "dataset_info.json"
_IMAGES = ("images", "image", "image_path", "image_paths")
"""Keys that may hold image paths: a list, or one path."""

_LEADING_MARKS = re.compile(rf"Human user:\n((?:{IMAGE}\n)*)")
_RESULT = "<result>"
_NO_LABELS = f"{_RESULT}\nRequest: none\nResponse: none\n</result>"
_FIELD: dict[Target, re.Pattern[str]] = {
    target: re.compile(rf"^\s*{target}:\s*(\S+)\s*$", re.IGNORECASE | re.MULTILINE)
    for target in ("request", "response")
}
_GOLD: dict[str, GoldLabel] = {"harmful": "harmful", "unharmful": "unharmful", "harmless": "unharmful"}
_ABSENT = ("", "none", "null")


@dataclass(frozen=True)
class Conversation:
    """The user's message, the assistant's message, and the image paths."""

    asked: str
    answered: str
    images: tuple[str, ...]


def read_conversations(path: Path) -> Iterator[SourceRow]:
    """The file's rows; none for LLaMA-Factory's list of data sets, which lies beside the data."""
    return iter(()) if path.name == _DATASET_INFO else read_records(path)


def conversation_of(record: Record, context: RecordContext, messages: str, role: str, text: str) -> Conversation:
    """The single user and the single assistant message under these keys; the system message is ignored.

    Raises `NotASampleError` for any other set of messages, and for media that are not read.
    """
    listed = record.get(messages)
    by_role: dict[str, list[Record]] = {"user": [], "assistant": []}
    for message in listed if isinstance(listed, list) else ():
        name = _ROLES.get(str(message.get(role))) if isinstance(message, dict) else None
        if name is None:
            raise NotASampleError(f"{messages!r}: a message with an unknown role")
        if medium := unread_medium(message, (text,)):
            raise NotASampleError(f"{medium!a:.40} of a message: a medium that this layout does not read")
        if name in by_role:
            by_role[name].append(message)
    if any(len(listed) != 1 for listed in by_role.values()):
        raise NotASampleError("not exactly one user and one assistant message")
    user, assistant = (text_field(listed[0], text) for listed in by_role.values())
    return Conversation(user, assistant, images_of(record, context))


def conversation_sample(spoken: Conversation, record: Record, context: RecordContext) -> Sample:
    """The sample of a conversation. Raises `NotASampleError` if it breaks the protocol."""
    overrides = _overrides(record)
    fields: dict[str, Any] = {"id": context.id, "source": context.name, "images": spoken.images}
    fields |= _exchange(spoken, overrides) | overrides
    fields |= _answer_fields(spoken.answered, fields, overrides) | overrides
    fields.setdefault("modality", modality_of(fields["prompt"], fields["response"], spoken.images))
    try:
        return Sample.model_validate(fields)
    except ValidationError as error:
        raise NotASampleError(f"{_ODD_FIELDS} ({field_fault(error)})") from error


def gold_label(text: str, target: Target, *, bare: bool = False) -> GoldLabel | None:
    """The label in the line `Request: ...` or `Response: ...`; with `bare`, a text without such a line is the label.

    None if there is no label. Raises `NotASampleError` for several labels or an unknown word.
    """
    words = _FIELD[target].findall(text)
    if len(words) > 1:
        raise NotASampleError(f"several {target} labels")
    word = (words[0] if words else text.strip() if bare and ":" not in text else "").strip().lower()
    if word in _ABSENT:
        return None
    if word not in _GOLD:
        raise NotASampleError(f"its {target} label is none of {', '.join(_GOLD)}")
    return _GOLD[word]


def images_of(record: Record, context: RecordContext) -> tuple[str, ...]:
    """The paths of images below the file's folder; a leading `data/` (the authors' training folder) is optional.

    Raises `NotASampleError` for values that are not paths, and for other media.
    """
    if medium := unread_medium(record, _IMAGES):
        raise NotASampleError(f"{medium!a:.40}: a medium that this layout does not read")
    listed = [record[key] for key in _IMAGES if record.get(key) not in (None, "", [])]
    several = [names if isinstance(names, list) else [names] for names in listed]
    names = several[0] if several else []
    if any(other != names for other in several):
        raise NotASampleError(f"several keys hold images; use {_IMAGES[0]!r} alone")
    if not all(isinstance(name, str) and name for name in names):
        raise NotASampleError("its images are not a list of paths")
    if any(".." in PurePath(name).parts for name in names):
        raise NotASampleError("an image outside the data set's folder")
    return tuple(image_of(context, name, name.removeprefix("./").removeprefix("data/")) for name in names)


def check_marks(spoken: Conversation) -> None:
    """Raises `NotASampleError` unless each image has one mark before the prompt and no other medium has a mark."""
    counts = marks(spoken.asked)
    for medium in ("video", "audio"):
        if counts[medium]:
            raise NotASampleError(f"a <{medium}> mark: only texts and images are read")
    leading = _LEADING_MARKS.search(spoken.asked)
    if {counts["image"], leading[1].count(IMAGE) if leading else 0} != {len(spoken.images)}:
        raise NotASampleError(f"the number of images differs from the number of {IMAGE} marks before the prompt")


def _overrides(record: Record) -> dict[str, Any]:
    """The fields under the key `sample`, without images."""
    fields = record.get("sample")
    if fields is None:
        return {}
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name, ""), str | None) for name in _TEXTS):
        raise NotASampleError(_ODD_FIELDS)
    prompt = {"prompt": fields["prompt"] or ""} if "prompt" in fields else {}
    return {name: value for name, value in fields.items() if name != "images"} | prompt


def _exchange(spoken: Conversation, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt and response of the user's message; nothing if `overrides` has both."""
    check_marks(spoken)
    if overrides.keys() >= {*_TEXTS}:
        return {}
    try:
        exchange = parse_released_input(spoken.asked, spoken.images)
    except InputError as error:
        raise NotASampleError("not the released layout") from error
    return {"prompt": exchange.prompt or "", "response": exchange.response}


def _answer_fields(text: str, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Labels and reasoning of the assistant's message; it may lack label lines if `overrides` has both labels."""
    if overrides.keys() >= {*_LABELS}:
        if "reasoning" in overrides:
            return {}
        text = text.partition(_RESULT)[0] + _NO_LABELS
        parsed = parse_verdict(text, has_prompt=False, has_response=False, finish_reason="stop")
    else:
        has_prompt = bool(fields["prompt"].strip() or fields["images"])
        has_response = bool((fields["response"] or "").strip())
        parsed = parse_verdict(text, has_prompt, has_response, "stop")
    if parsed.reason:
        raise NotASampleError(f"its answer breaks the protocol: {parsed.reason}")
    return {
        "request_label": _known_label(parsed.request),
        "response_label": _known_label(parsed.response),
        "reasoning": parsed.reasoning or None,
    }


def _known_label(label: Label) -> str | None:
    return None if label is Label.NOT_APPLICABLE else label.value
