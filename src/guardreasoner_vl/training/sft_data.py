"""Converts samples to token rows with a loss mask (docs/protocol.md, section 4)."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.engines.qwen import END_OF_TURN, chat_text
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.baseline import HashedNgramBaseline
from guardreasoner_vl.images.exchange import measured_exchange
from guardreasoner_vl.protocol import Span, TargetLabel, build_messages, neutralise, training_target
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.teachers.rules import explain
from guardreasoner_vl.types import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.images.sizes import ImageSizes
    from guardreasoner_vl.types import GoldLabel, Sample

IGNORED = -100
Known = dict[Target, TargetLabel]


@dataclass(frozen=True)
class TokenRow:
    """Token ids of prompt and completion, labels with `IGNORED` where there is no loss, and image paths."""

    id: str
    source: str
    input_ids: list[int]
    labels: list[int]
    images: tuple[str, ...] = ()


@dataclass
class TokenRows:
    """The rows to train on, and the skipped ones by reason."""

    rows: list[TokenRow] = field(default_factory=list)
    skipped: SkippedRows = field(default_factory=SkippedRows)


def target_labels(samples: Sequence[Sample]) -> list[Known]:
    """The label words of each row's result; unknown labels are predicted by a classifier and carry no loss."""
    request = _known_or_guessed(samples, "request", lambda row: row.has_request)
    response = _known_or_guessed(samples, "response", lambda row: row.has_response)
    return [{"request": first, "response": second} for first, second in zip(request, response, strict=True)]


def _known_or_guessed(
    samples: Sequence[Sample], target: Target, present: Callable[[Sample], bool]
) -> list[TargetLabel]:
    gold: list[GoldLabel | None] = [getattr(row, f"{target}_label") for row in samples]
    unknown = [row for row, label in zip(samples, gold, strict=True) if present(row) and label is None]
    guesses = iter(HashedNgramBaseline.fit(samples, target).probabilities(unknown) if unknown else ())
    labels = []
    for row, label in zip(samples, gold, strict=True):
        if not present(row):
            labels.append(TargetLabel("None"))
        elif label is not None:
            labels.append(TargetLabel(label))
        else:
            labels.append(TargetLabel("harmful" if next(guesses) > 0.5 else "unharmful", known=False))
    return labels


def reasoning_of(sample: Sample, labels: Known, teacher: Literal["rules"] | None) -> Sequence[Span] | str | None:
    """The row's own reasoning, neutralised like all of its texts, or the offline teacher's."""
    if sample.reasoning and sample.reasoning.strip():
        return neutralise(sample.reasoning)
    return explain(sample, labels["request"], labels["response"]) if teacher == "rules" else None


def tokenise(
    samples: Sequence[Sample],
    labels: Sequence[Known],
    inputs: QwenInputs,
    *,
    max_length: int,
    without_reasoning: float,
    teacher: Literal["rules"] | None,
    seed: int,
    sizes: ImageSizes,
) -> TokenRows:
    """Token rows of all samples of at most `max_length` tokens; longer ones are skipped, never truncated."""
    rng = random.Random(seed)
    result = TokenRows()
    for sample, known in zip(samples, labels, strict=True):
        skip_reasoning = rng.random() < without_reasoning
        reasoning = None if skip_reasoning else reasoning_of(sample, known, teacher)
        try:
            row = token_row(sample, training_target(reasoning, known["request"], known["response"]), inputs, sizes)
        except InputError as error:
            result.skipped.add(error.code)
            continue
        if len(row.input_ids) > max_length:
            result.skipped.add(f"longer than {max_length} tokens")
        elif not any(label.known and label.word != "None" for label in known.values()):
            result.skipped.add("no label is known")
        else:
            result.rows.append(row)
    return result


def token_row(sample: Sample, target: Sequence[Span], inputs: QwenInputs, sizes: ImageSizes) -> TokenRow:
    """One row; prompt and completion are tokenised as one text, as the engine does. Raises `InputError`."""
    exchange, images = measured_exchange(sample.exchange(), sizes)
    pads = [inputs.pads(inputs.grid(image.height, image.width)) for image in images]
    text = chat_text(build_messages(exchange), pads)
    spans = [(0, False)]
    for span in (*target, Span(END_OF_TURN, True)):
        spans.append((len(text), span.loss))
        text += span.text
    encoding = inputs.tokenizer.encode(text, add_special_tokens=False)
    token_labels = []
    at = 0
    for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
        while at + 1 < len(spans) and spans[at + 1][0] <= start:
            at += 1
        token_labels.append(token if spans[at][1] else IGNORED)
    return TokenRow(
        sample.id, sample.source, list(encoding.ids), token_labels, tuple(str(Path(path)) for path in sample.images)
    )
