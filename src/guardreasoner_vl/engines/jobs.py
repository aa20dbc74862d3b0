"""Requests on their way through the in-process engine: batched by length, equal prompts side by side.

Equal prompts are one and the same `Encoded` object, so that a batch reads each of them once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.engines.qwen import Encoded

_UNLIKE, _PADDING = 4, 256
"""A prompt that is padded to more than `_UNLIKE` times its length, and by more than `_PADDING` tokens, costs more than
a batch of its own. Between shorter ones a further batch costs more than the padding."""


@dataclass(frozen=True)
class Job:
    """One readable request: its place in the call and its encoded prompt."""

    place: int
    request: EngineRequest
    prompt: Encoded


def prompt_key(request: EngineRequest) -> Hashable:
    """What makes two requests' prompts equal."""
    return tuple(request.messages), tuple(request.images), request.forced_prefix, request.pixels


def same_prompts(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in their order, those beside each other with one prompt taken together."""
    return [list(run) for _, run in groupby(jobs, key=lambda job: id(job.prompt))]


def batches(jobs: Sequence[Job], max_rows: int, max_tokens: int) -> Iterator[list[Job]]:
    """Batches of at most `max_rows` rows, and `max_tokens` for rows times longest prompt.

    Prompts of like length come together, longest first, and short ones without much longer ones, so that a batch pads
    little. Equal prompts stay in one batch if they fit in one.
    """
    groups: dict[Hashable, dict[int, list[Job]]] = {}
    for job in jobs:
        runs = groups.setdefault(_shared_settings(job.request), {})
        runs.setdefault(id(job.prompt), []).append(job)
    for runs in groups.values():
        batch: list[Job] = []
        limit = 0
        for run in sorted(runs.values(), key=lambda run: -len(run[0].prompt.ids)):
            most = max(1, min(max_rows, max_tokens // len(run[0].prompt.ids)))
            for piece in (run[at : at + most] for at in range(0, len(run), most)):
                if batch and (_is_unlike(batch[0], run[0]) or len(batch) + len(piece) > limit):
                    yield batch
                    batch = []
                if not batch:
                    limit = most
                batch = [*batch, *piece]
        yield batch


def _is_unlike(longest: Job, job: Job) -> bool:
    """Whether a batch that holds `longest` would pad the job too much."""
    most, least = len(longest.prompt.ids), len(job.prompt.ids)
    return most > _UNLIKE * least and most - least > _PADDING


def _shared_settings(request: EngineRequest) -> Hashable:
    """What all requests of a batch must agree on."""
    return request.pixels, tuple(request.candidates) if request.label_fields else ()
