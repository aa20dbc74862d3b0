"""The paper's text benchmarks as their own authors publish them, `record -> Sample`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.adapters import NotASampleError, Place, label_of, text_of
from guardreasoner_vl.types import GoldLabel, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.sources.records import Record

_ZERO_ONE: dict[object, GoldLabel] = {"1": "harmful", 1: "harmful", "0": "unharmful", 0: "unharmful"}
_WORDS: dict[object, GoldLabel] = {"harmful": "harmful", "unharmful": "unharmful"}
_SAFE: dict[object, GoldLabel] = {True: "unharmful", False: "harmful"}
_FLAGS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
_TWO_OF_THREE = 2


def _sample(
    place: Place,
    prompt: str,
    response: str | None = None,
    *,
    request: GoldLabel | None = None,
    answered: GoldLabel | None = None,
    category: object = None,
    id: str | None = None,  # noqa: A002
) -> Sample:
    return Sample(
        id=id or place.id,
        source=place.name,
        split="test",
        modality="text",
        prompt=prompt,
        response=response,
        request_label=request,
        response_label=answered,
        meta={"category": category} if category else {},
    )


def toxic_chat(record: Record, place: Place) -> Sample | None:
    """Card `lmsys/toxic-chat`: rows that people annotated; `toxicity` labels the user's input."""
    if str(record.get("human_annotation")) != "True":
        return None
    return _sample(place, text_of(record, "user_input"), request=label_of(record.get("toxicity"), _ZERO_ONE))


def harmbench_prompt(record: Record, place: Place) -> Sample | None:
    """HarmBench's test behaviours without the contextual ones; all are harmful."""
    if record.get("FunctionalCategory") not in ("standard", "copyright"):
        return None
    return _sample(
        place,
        text_of(record, "Behavior"),
        request="harmful",
        category=record.get("SemanticCategory"),
        id=f"{place.name}/{text_of(record, 'BehaviorID')}",
    )


def harmbench_response(record: Record, place: Place) -> Sample:
    """HarmBench's classifier validation set: harmful where at least two of three people say so."""
    votes = [label_of(record.get(f"human_{number}"), _ZERO_ONE) for number in range(3)]
    label: GoldLabel = "harmful" if votes.count("harmful") >= _TWO_OF_THREE else "unharmful"
    return _sample(place, text_of(record, "test_case"), text_of(record, "generation"), answered=label)


def openai_moderation(record: Record, place: Place) -> Sample:
    """Harmful where any category's flag is 1; a missing flag is unknown and counts as 0, as in the literature."""
    flags = {name: record[name] for name in _FLAGS if record.get(name) is not None}
    raised = [name for name, value in flags.items() if label_of(int(value), _ZERO_ONE) == "harmful"]
    return _sample(
        place,
        text_of(record, "prompt"),
        request="harmful" if raised else "unharmful",
        category=raised[0] if raised else None,
    )


def aegis(record: Record, place: Place) -> Sample | None:
    """Card `nvidia/Aegis-AI-Content-Safety-Dataset-1.0`: user messages; harmful unless two of three say Safe."""
    if record.get("text_type") != "user_message":
        return None
    votes = [record.get(f"labels_{number}") for number in range(3)]
    if not all(isinstance(vote, str) and vote for vote in votes):
        raise NotASampleError("fewer than three annotations")
    label: GoldLabel = "unharmful" if votes.count("Safe") >= _TWO_OF_THREE else "harmful"
    return _sample(place, text_of(record, "text").strip(), request=label)


def simple_safety_tests(record: Record, place: Place) -> Sample:
    """All prompts are harmful."""
    return _sample(place, text_of(record, "prompt"), request="harmful", category=record.get("harm_area"))


def wildguard_prompt(record: Record, place: Place) -> Sample | None:
    """Card `allenai/wildguardmix`, config wildguardtest; rows without agreement have no label and are left out."""
    if record.get("prompt_harm_label") is None:
        return None
    label = label_of(record["prompt_harm_label"], _WORDS)
    return _sample(place, text_of(record, "prompt"), request=label, category=record.get("subcategory"))


def wildguard_response(record: Record, place: Place) -> Sample | None:
    """The same file's responses."""
    if record.get("response_harm_label") is None:
        return None
    label = label_of(record["response_harm_label"], _WORDS)
    response = text_of(record, "response")
    return _sample(place, text_of(record, "prompt"), response, answered=label, category=record.get("subcategory"))


def safe_rlhf(record: Record, place: Place) -> Sample | None:
    """Card `PKU-Alignment/PKU-SafeRLHF` at revision v0: both answers of a prompt, where just one is safe.

    Here the safe one; `safe_rlhf_pick` adds the other.
    """
    flags = [record.get(f"is_response_{number}_safe") for number in range(2)]
    if not all(isinstance(flag, bool) for flag in flags):
        raise NotASampleError("no safety flags")
    if flags[0] == flags[1]:
        return None
    answers = [text_of(record, f"response_{number}") for number in range(2)]
    safe = flags.index(True)
    sample = _sample(place, text_of(record, "prompt"), answers[safe], answered="unharmful")
    return sample.model_copy(update={"meta": {"other": answers[1 - safe]}})


def safe_rlhf_pick(samples: Sequence[Sample]) -> Sequence[Sample]:
    """The literature's 2,000: of 1,000 prompts drawn with seed 42 first the safe answers, then the unsafe ones."""
    drawn = random.Random(42).sample(list(samples), min(1000, len(samples)))
    unsafe = [
        row.model_copy(
            update={
                "id": f"{row.id}-unsafe",
                "response": row.meta["other"],
                "response_label": "harmful",
                "meta": {},
            }
        )
        for row in drawn
    ]
    return [*(row.model_copy(update={"meta": {}}) for row in drawn), *unsafe]


def beavertails(record: Record, place: Place) -> Sample:
    """Card `PKU-Alignment/BeaverTails`, split 30k_test: labels the answer to its prompt."""
    categories = record.get("category")
    named = [name for name, on in categories.items() if on] if isinstance(categories, dict) else []
    label = label_of(record.get("is_safe"), _SAFE)
    return _sample(
        place,
        text_of(record, "prompt"),
        text_of(record, "response"),
        answered=label,
        category=named[0] if named else None,
    )


def xstest_response(record: Record, place: Place) -> Sample:
    """Card `allenai/xstest-response`, split response_harmfulness."""
    label = label_of(record.get("label"), _WORDS)
    return _sample(place, text_of(record, "prompt"), text_of(record, "response"), answered=label)
