"""Batches: equal prompts together, like lengths together, within both limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.engines.jobs import EncodedRequest, batches, prompt_key, same_prompts
from guardreasoner_vl.engines.qwen import Encoded
from guardreasoner_vl.images.geometry import PixelBudget
from tests.engines.conformance import asked, with_image
from tests.made_images import image


def prompt(tokens: int) -> Encoded:
    return Encoded([1] * tokens, [], np.zeros((3, tokens), dtype=np.int64))


def jobs_of(prompts: list[Encoded], **values: Any) -> list[EncodedRequest]:
    return [EncodedRequest(place, replace(asked(), **values), encoded) for place, encoded in enumerate(prompts)]


def places(groups: list[list[EncodedRequest]]) -> list[list[int]]:
    return [[job.place for job in batch] for batch in groups]


def test_equal_prompts_come_side_by_side_longest_first() -> None:
    short, long, other = prompt(5), prompt(9), prompt(5)
    result = list(batches(jobs_of([short, long, other, short, long, other]), 32, 1000))
    assert places(result) == [[1, 4, 0, 3, 2, 5]]
    assert places(same_prompts(result[0])) == [[1, 4], [0, 3], [2, 5]]


def test_equal_prompts_that_fit_in_one_batch_stay_together() -> None:
    first, second, third = prompt(9), prompt(8), prompt(7)
    result = list(batches(jobs_of([first] * 3 + [second] * 3 + [third]), 4, 1000))
    assert places(result) == [[0, 1, 2], [3, 4, 5, 6]]


def test_more_equal_prompts_than_a_batch_takes_are_split() -> None:
    first, second = prompt(9), prompt(8)
    assert places(list(batches(jobs_of([first] * 5 + [second]), 2, 1000))) == [[0, 1], [2, 3], [4, 5]]


def test_tokens_are_rows_times_the_longest() -> None:
    assert places(list(batches(jobs_of([prompt(10), prompt(4), prompt(4)]), 32, 20))) == [[0, 1], [2]]
    assert places(list(batches(jobs_of([prompt(50), prompt(4)]), 32, 20))) == [[0], [1]]


def test_a_prompt_many_times_as_long_as_the_next_one_is_a_batch_of_its_own() -> None:
    first, second, third, fourth = prompt(400), prompt(101), prompt(99), prompt(30)
    assert places(list(batches(jobs_of([fourth, third, second, first]), 32, 10_000))) == [[3, 2], [1, 0]]
    assert places(list(batches(jobs_of([first, fourth, first, fourth]), 32, 10_000))) == [[0, 2], [1, 3]]
    assert places(list(batches(jobs_of([prompt(260), prompt(5)]), 32, 10_000))) == [[0, 1]]  # little is padded


def test_other_settings_never_share_a_batch() -> None:
    shared = prompt(5)
    small = PixelBudget(28 * 28, 56 * 56)
    asked_for: list[dict[str, Any]] = [
        {},
        {"pixels": small},
        {},
        {"pixels": small},
        {"label_fields": ("Request:",), "candidates": ("a", "b")},
    ]
    jobs = [replace(jobs_of([shared], **values)[0], place=place) for place, values in enumerate(asked_for)]
    assert places(list(batches(jobs, 32, 1000))) == [[0, 2], [1, 3], [4]]


def test_candidates_that_nobody_reads_do_not_divide() -> None:
    jobs = [*jobs_of([prompt(5)], candidates=("a", "b")), *jobs_of([prompt(4)])]
    assert len(list(batches(jobs, 32, 1000))) == 1


def test_nothing_to_do() -> None:
    assert list(batches([], 32, 1000)) == []
    assert same_prompts([]) == []


def test_what_makes_prompts_equal() -> None:
    first, second = with_image(asked()), with_image(asked())
    assert prompt_key(first) == prompt_key(replace(second, seed=3, temperature=1.2, top_p=0.5, max_new_tokens=7))
    shown = first.images[0]
    for changed in (
        replace(first, images=(image(shown.width, shown.height),)),
        replace(first, forced_prefix="<think>"),
        replace(first, pixels=PixelBudget()),
        replace(first, messages=asked().messages),
    ):
        assert prompt_key(changed) != prompt_key(first)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=40),
    st.integers(1, 8),
    st.integers(1, 60),
)
def test_any_jobs(lengths: list[int], choices: list[int], max_rows: int, max_tokens: int) -> None:
    prompts = [prompt(length) for length in lengths]
    jobs = jobs_of([prompts[choice % len(prompts)] for choice in choices])
    result = list(batches(jobs, max_rows, max_tokens))
    assert sorted(job.place for batch in result for job in batch) == list(range(len(jobs)))
    counts = Counter(id(job.prompt) for job in jobs)
    for batch in result:
        longest = max(len(job.prompt.ids) for job in batch)
        assert len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
        assert [len(job.prompt.ids) for job in batch] == sorted((len(job.prompt.ids) for job in batch), reverse=True)
        assert len(same_prompts(batch)) == len({id(job.prompt) for job in batch})
    for job in jobs:
        holding = [batch for batch in result if any(other.prompt is job.prompt for other in batch)]
        most = max(1, min(max_rows, max_tokens // len(job.prompt.ids)))
        assert len(holding) == -(-counts[id(job.prompt)] // most)
