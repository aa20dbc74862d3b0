"""A corpus on disk, with what a teacher wrote about it, and its check."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from guardreasoner_vl.corpus.attempts import REASONING, Attempt
from guardreasoner_vl.corpus.check import check_corpus
from guardreasoner_vl.corpus.store import (
    INFO,
    CorpusInfo,
    is_corpus,
    read_corpus,
    read_info,
    read_mixture,
    write_corpus,
)
from guardreasoner_vl.errors import DataError
from tests.builders import sample
from tests.corpus.test_stats import REASONING as STEPS

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import Sample


def written(folder: Path, *rows: Sample) -> Path:
    write_corpus(folder, CorpusInfo(name="toy", seed=3), rows)
    return folder


def test_rows_and_description_come_back(tmp_path: Path) -> None:
    assert not is_corpus(tmp_path)
    rows = [sample("a", request_label="harmful", meta={"tags": [1, "x"], "kind": 2}), sample("b")]
    written(tmp_path, *rows)
    assert is_corpus(tmp_path)
    assert list(read_corpus(tmp_path)) == rows
    assert (read_info(tmp_path).rows, read_info(tmp_path).seed) == (2, 3)


def test_what_a_teacher_wrote_is_merged(tmp_path: Path) -> None:
    written(tmp_path, sample("a", request_label="unharmful"), sample("b"), sample("c"))
    attempts = [
        Attempt(id="a", reason="loop", teacher="t"),
        Attempt(id="a", reasoning=STEPS, teacher="t"),
        Attempt(id="b", reasoning=STEPS, teacher="t", request_label="harmful"),
        Attempt(id="c", reason="refusal", final=True, teacher="t"),
    ]
    lines = "".join(attempt.model_dump_json() + "\n" for attempt in attempts)
    (tmp_path / REASONING).write_text(lines + '{"id": "c", "reasoning": "torn')
    first, second, third = read_corpus(tmp_path)
    assert (first.reasoning, first.request_label) == (STEPS, "unharmful")
    assert (second.request_label, second.meta["teacher"]) == ("harmful", "t")
    assert (third.reasoning, third.request_label) == (None, None)


def test_training_takes_rows_as_often_as_they_say(tmp_path: Path) -> None:
    rows = [sample("a", meta={"repeat": 2}), sample("b", split="validation"), sample("c", split="test"), sample("d")]
    mixture = read_mixture(written(tmp_path, *rows))
    assert [row.id for row in mixture.train] == ["a", "a", "d"]
    assert [row.id for row in mixture.held_out] == ["b"]
    assert [row.id for row in mixture.test] == ["c"]


def test_other_folders_and_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="curate --out"):
        read_info(tmp_path)
    written(tmp_path, sample("a"))
    content = json.loads((tmp_path / INFO).read_text())
    (tmp_path / INFO).write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(DataError, match="the corpus has version 99, but version 1 is needed"):
        list(read_corpus(tmp_path))
    (tmp_path / INFO).write_text("{}")
    with pytest.raises(DataError, match="not a valid corpus description"):
        read_info(tmp_path)


def test_a_sound_corpus_has_no_faults(tmp_path: Path) -> None:
    sound = [
        sample("a", request_label="unharmful", reasoning=STEPS),
        sample("b", prompt="cake?", request_label="harmful", response="Mix.", response_label="harmful"),
    ]
    assert check_corpus(written(tmp_path, *sound))[1].rows == []


def test_every_fault_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    rows = [
        sample("a", request_label="unharmful"),
        sample("a", prompt="other", request_label="unharmful"),
        sample("b", prompt="BREAD? ".lower(), request_label="harmful"),
        sample("c", prompt="no label"),
        sample("d", prompt="said", response_label="harmful"),
        sample("e", modality="image", prompt="", images=(str(broken),), request_label="harmful"),
        sample("f", modality="image", prompt="", images=(str(tmp_path / "fine.png"),), request_label="harmful"),
        sample("g", prompt="steps", request_label="harmful", reasoning="no headings at all"),
        sample("h", prompt="tags", request_label="harmful", reasoning="## Reasoning Step 1\n</think> <think>"),
        sample("i", prompt="ids", request_label="harmful", reasoning="## Reasoning Step 1\nso <|im_end|> it is"),
    ]
    count, faults = check_corpus(written(tmp_path / "corpus", *rows))
    assert count == len(rows)
    assert [(name, reason.partition(":")[0]) for name, reason in faults.rows] == [
        ("a", "repeated id"),
        ("b", "contradictory labels"),
        ("c", "no label"),
        ("d", "a response label without a response"),
        ("e", "unreadable image"),
        ("g", "reasoning"),
        ("h", "reasoning"),
        ("i", "reasoning"),
    ]
    assert faults.rows[-1][1] == "reasoning: contains a protocol marker, which training neutralises"
