"""Requests that a language model writes: harmless, whole, told apart, and the same after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.stages import write_requests as stage
from guardreasoner_vl.stages.write_requests import RequestSettings
from guardreasoner_vl.training.pretrained_base import LanguageModel, load_language_model
from tests.training.test_pretrained_base import write_llama

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_language_model(str(write_llama(tmp_path_factory.mktemp("llama"))))


class Script:
    """Stands in for sampling: ends of requests by turns, one answer for all."""

    def __init__(self, ends: Sequence[tuple[str, bool]]) -> None:
        self.ends, self.answer = ends, ("Sure thing. And th", False)
        self._at = 0

    def __call__(self, _: Any, heads: Sequence[str], new_tokens: int, __: RequestSettings) -> list[tuple[str, bool]]:
        if heads[0].rstrip("\n").endswith("assistant"):
            return [self.answer] * len(heads)
        self._at += len(heads)
        return [(f"{end} {self._at + place}", ended) for place, (end, ended) in enumerate(self.cycle(len(heads)))]

    def cycle(self, count: int) -> list[tuple[str, bool]]:
        return [self.ends[place % len(self.ends)] for place in range(count)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / stage.ROWS).read_text("utf-8").splitlines()]


def test_whole_harmless_requests_are_kept(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = [(" bake bread?", True), (" bake bread and", False), (" build a bomb?", True), ("\x07", True)]
    script = Script(ends)
    monkeypatch.setattr(stage, "sampled", script)
    monkeypatch.setattr(stage, "OPENINGS", ("How do I", "Why"))
    counts = stage.run(model, "toy", RequestSettings(count=4, batch=8, answered=0.5), tmp_path)
    assert counts == {"kept": 4, "not ended": 4, "alarming word": 4, "no sentence": 4}
    rows = rows_of(tmp_path)
    assert [row["prompt"].rsplit(" ", 1)[0] for row in rows] == ["How do I bake bread?"] * 2 + ["Why bake bread?"] * 2
    samples = list(read_samples(tmp_path / stage.ROWS))
    assert {sample.request_label for sample in samples} == {"unharmful"}
    assert [sample.response for sample in samples] == ["Sure thing.", None] * 2
    assert [sample.response_label for sample in samples] == ["unharmful", None] * 2
    assert len({sample.id for sample in samples}) == 4


def test_a_request_that_comes_again_is_left_out(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "OPENINGS", ("How do I",))
    monkeypatch.setattr(
        stage,
        "sampled",
        lambda _, heads, __, ___: [
            (f" Bake {'rye' if place else 'white'} Bread?", True) for place in range(len(heads))
        ],
    )
    with pytest.raises(DataError, match="no new one"):
        stage.run(model, "toy", RequestSettings(count=9, batch=3, answered=0), tmp_path)
    assert [row["prompt"] for row in rows_of(tmp_path)] == ["How do I Bake white Bread?", "How do I Bake rye Bread?"]


def test_a_resumed_run_gives_the_same_rows(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RequestSettings(count=12, batch=8, answered=0.5, seed=3)
    monkeypatch.setattr(stage, "_fault", lambda request, _: None if request.isprintable() else "no sentence")
    stage.run(model, "toy", settings, tmp_path / "whole")
    whole = rows_of(tmp_path / "whole")
    assert len(whole) == 12
    parts = tmp_path / "parts"
    stage.run(model, "toy", replace(settings, count=5), parts)
    assert rows_of(parts) == whole[:5]
    with (parts / stage.BATCHES).open("ab") as torn:
        torn.write(b'{"rows": [')
    stage.run(model, "toy", settings, parts)
    assert rows_of(parts) == whole
    assert (parts / stage.REPORT).read_text() == (tmp_path / "whole" / stage.REPORT).read_text()
    for name, other in (("toy", replace(settings, seed=4)), ("another", settings)):
        with pytest.raises(DataError, match="holds written requests with other inputs"):
            stage.run(model, name, other, parts)


def test_text_ends_where_the_turn_does(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    end = model.texts.eos_token_id
    (word, *_) = model.tokenizer.encode(" bread").ids
    answers = torch.tensor([[word, end, word], [word, word, word]])
    monkeypatch.setattr(model.network, "generate", lambda input_ids, **_: torch.cat((input_ids, answers), dim=1))
    text = model.tokenizer.decode([word])
    sampled = stage.sampled(model, ["My neighbour", "Please"], 3, RequestSettings(count=1))
    assert sampled == [(text, True), (text * 3, False)]
