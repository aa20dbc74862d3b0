"""Batches the requests of the in-process engine by prompt length and keeps equal prompts together.

Requests with equal prompts share one `Encoded` object, so that a batch reads each prompt once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.engines.qwen import Encoded

MAX_TOKENS = 32_768
"""Prompt tokens, padding included, that the engine reads at once by default."""

_UNLIKE, _PADDING = 4, 256
"""Padding a prompt to more than `_UNLIKE` times its length and by more than `_PADDING` tokens costs more than running
one more batch; less padding costs less."""


@dataclass(frozen=True)
class EncodedRequest:
    """One valid request: its position in the call and its encoded prompt."""

    place: int
    request: EngineRequest
    prompt: Encoded


def prompt_key(request: EngineRequest) -> Hashable:
    """A key that two requests share if their prompts are equal."""
    return tuple(request.messages), tuple(request.images), request.forced_prefix, request.pixels


def same_prompts(jobs: Sequence[EncodedRequest]) -> list[list[EncodedRequest]]:
    """Group adjacent jobs that share a prompt; the order is kept."""
    return [list(run) for _, run in groupby(jobs, key=lambda job: id(job.prompt))]


def batches(jobs: Sequence[EncodedRequest], max_rows: int, max_tokens: int) -> Iterator[list[EncodedRequest]]:
    """Yield batches of at most `max_rows` rows and at most `max_tokens` tokens (rows times the longest prompt).

    Prompts are sorted by length, longest first, and much shorter ones start a new batch, so that a batch needs little
    padding. Equal prompts stay in one batch if they fit into one.
    """
    groups: dict[Hashable, dict[int, list[EncodedRequest]]] = {}
    for job in jobs:
        runs = groups.setdefault(_shared_settings(job.request), {})
        runs.setdefault(id(job.prompt), []).append(job)
    for runs in groups.values():
        batch: list[EncodedRequest] = []
        limit = 0
        for run in sorted(runs.values(), key=lambda run: -len(run[0].prompt.ids)):
            run_limit = max(1, min(max_rows, max_tokens // len(run[0].prompt.ids)))
            for part in (run[start : start + run_limit] for start in range(0, len(run), run_limit)):
                if batch and (_is_unlike(batch[0], run[0]) or len(batch) + len(part) > limit):
                    yield batch
                    batch = []
                if not batch:
                    limit = run_limit
                batch = [*batch, *part]
        yield batch


def _is_unlike(longest: EncodedRequest, job: EncodedRequest) -> bool:
    """Whether the job would be padded too much in a batch whose longest prompt is that of `longest`."""
    batch_length, length = len(longest.prompt.ids), len(job.prompt.ids)
    return batch_length > _UNLIKE * length and batch_length - length > _PADDING


def _shared_settings(request: EngineRequest) -> Hashable:
    """The settings that all requests of a batch must share."""
    return request.pixels, tuple(request.candidates) if request.label_fields else ()
