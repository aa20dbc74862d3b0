"""Folders of models that the stages write."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.training.model_folder import write_model

if TYPE_CHECKING:
    from pathlib import Path

QWEN = {"eos_token_id": [7, 8], "pad_token_id": 7, "do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1}


class Model:
    """Writes what transformers writes beside the weights, where it `writes` anything."""

    def __init__(self, writes: dict[str, Any] | None) -> None:
        self.config, self._writes = SimpleNamespace(use_cache=False), writes

    def to(self, _: object) -> Model:
        return self

    def save_pretrained(self, folder: Path, state_dict: object) -> None:
        if self._writes is not None:
            (folder / "generation_config.json").write_text(json.dumps(self._writes))


def test_a_calibration_stays_with_the_weights_that_it_was_measured_with(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("calibration.json", "tokenizer.json", "model.safetensors.index.json"):
        (base / name).write_text("{}")
    write_model(Model(None), {}, base, tmp_path / "trained")
    assert {path.name for path in (tmp_path / "trained").iterdir()} == {"tokenizer.json", "generation_config.json"}


def test_a_folder_generates_greedily_and_without_penalties_whatever_its_base_does(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for place, (of_base, written) in enumerate([(QWEN, None), (None, QWEN), (QWEN, {"eos_token_id": [7, 7, 8]})]):
        if of_base:
            (base / "generation_config.json").write_text(json.dumps(of_base))
        write_model(Model(written), {}, base, tmp_path / str(place))
        generation = json.loads((tmp_path / str(place) / "generation_config.json").read_text())
        assert generation.pop("eos_token_id") == [7, 8]
        assert {name: value for name, value in generation.items() if name != "pad_token_id"} == {
            "do_sample": False,
            "repetition_penalty": 1.0,
        }
