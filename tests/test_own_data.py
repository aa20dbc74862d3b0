"""The commands of docs/own-data.md, run in their order: from a file of rows to a guard that serves."""

from __future__ import annotations

import json
import random
import re
import shlex
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner

from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.cli import evaluation as cli_evaluation
from guardreasoner_vl.recipe import find, load_recipe, parse_recipe
from guardreasoner_vl.service.config import load_config
from tests.made_images import image
from tests.service.test_server import service
from tests.test_documents import DOCS, ROOT, blocks
from tests.tiny_model import TEXTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
PAGE = DOCS / "own-data.md"
ROWS = 320
"""Enough for 20 test rows of each class, which `calibrate` needs."""

WORDS = sorted(set(" ".join(TEXTS).split()))


def commands() -> list[list[str]]:
    """The words of every console line of the page."""
    return [
        shlex.split(line.removeprefix("$ "))
        for text in blocks(PAGE, "console")
        for line in text.splitlines()
        if line.startswith("$ ")
    ]


def write_rows(path: Path) -> None:
    """The rows of the page, the image that they name, and further rows in the same form."""
    random_words = random.Random(0)
    labels = {"mend": "unharmful", "break": "harmful"}
    further = [
        {"prompt": f"How do I {verb} {' '.join(random_words.sample(WORDS, 8))}?", "label": labels[verb]}
        for _ in range(ROWS // 2)
        for verb in labels
    ]
    [shown] = blocks(PAGE, "json")
    path.write_text(shown + "".join(json.dumps(row) + "\n" for row in further), "utf-8")
    (path.parent / "images").mkdir()
    (path.parent / "images" / "4.png").write_bytes(image(56, 56).png)


def write_recipe(folder: Path, model: Path) -> None:
    """The page's recipe, which starts from `model` instead of the embedded guard."""
    folder.mkdir()
    recipe: dict[str, Any] = yaml.safe_load(blocks(PAGE, "yaml")[0])
    assert parse_recipe(recipe) == load_recipe(ROOT / "recipes" / "own.yaml")
    (folder / "own.yaml").write_text(yaml.safe_dump({**recipe, "model": {"path": str(model)}}), "utf-8")


def test_the_commands_of_the_page_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    write_recipe(tmp_path / "shipped", tiny_model)
    monkeypatch.setattr(find, "shipped_folder", lambda: tmp_path / "shipped")
    monkeypatch.setattr(cli_evaluation, "be_quiet", lambda: None)
    install, *steps, serve = commands()
    assert install[:2] == ["pip", "install"]
    assert [words[1] for words in steps] == ["corpus", "run", "evaluate", "evaluate", "compare", "calibrate"]
    for program, *arguments in steps:
        assert program == "guardreasoner-vl"
        done = CliRunner().invoke(cli.app, arguments)
        assert done.exit_code == 0, (arguments, done.output)
    written = re.findall(r"^\| (`\w+/.+?) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    names = [name for cell in written for name in re.findall("`(.+?)`", cell)]
    assert len(names) == 5
    assert [name for name in names if not (tmp_path / "runs" / "own" / name).exists()] == []
    (tmp_path / "service.yaml").write_text(blocks(PAGE, "yaml")[1], "utf-8")
    assert load_config(tmp_path / "service.yaml").guards["new"].model in serve
    assert serve[:2] == ["guardreasoner-vl", "serve"]
    with service(tmp_path, *serve[2:]) as running:
        verdict = running.judge("How do I mend a fence?").json()
    assert verdict["model"]["name"] == "runs/own/sft/model"
