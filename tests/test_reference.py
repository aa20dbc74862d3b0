"""The reference in `docs/reference/` is what the code says, and says all of it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.protocol import Reason
from guardreasoner_vl.recipe import Recipe
from guardreasoner_vl.recipe.model import NewModel
from guardreasoner_vl.service.config import GuardSection, ServiceConfig
from tools.reference.__main__ import stale
from tools.reference.codes import ALL, GRAMMAR, REMEDIES
from tools.reference.errors import exceptions
from tools.reference.markdown import anchor, table
from tools.reference.pages import pages
from tools.reference.python_api import attributes
from tools.reference.settings import places
from tools.reference.types import type_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "guardreasoner_vl").rglob("*.py"))
LIBRARIES = ("torch", "transformers", "datasets", "trl")


def test_the_types_that_public_signatures_name_are_described() -> None:
    page = (ROOT / "docs" / "reference" / "python.md").read_text("utf-8")
    parts = re.split(r"^### ([A-Z]\w+)$", page.partition("## Types in signatures")[2], flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert {"Item", "ImageSource", "Mode", "ModelInfo", "Scale", "Engine", "VerdictError"} <= set(sections)
    assert all(text.rpartition("```")[2].strip() for text in sections.values())


def test_no_page_is_stale_and_the_check_loads_no_model_library() -> None:
    code = (
        "import json, sys\n"
        "from tools.reference.__main__ import main\n"
        "status = main(['--check'])\n"
        f"print(json.dumps([status, [name for name in {LIBRARIES} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *names, result = done.stdout.splitlines()
    assert json.loads(result) == [0, []], names


def test_a_page_that_differs_or_does_not_belong_is_named(tmp_path: Path) -> None:
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "recipes.md").write_text("old\n")
    (tmp_path / "gone.md").write_text("")
    assert {"gone.md", "recipes.md"} <= set(stale(tmp_path, pages()))


@pytest.mark.parametrize("root", [Recipe, ServiceConfig])
def test_every_setting_has_a_description(root: type[BaseModel]) -> None:
    settings = {
        f"{places_of[0]}.{name}": field.description
        for section, places_of in places(root).items()
        for name, field in section.model_fields.items()
    }
    assert len(settings) > 50
    assert [name for name, text in settings.items() if not text or text.strip()[-1] not in ".)"] == []


def test_every_field_of_the_policy_is_described() -> None:
    assert list(attributes(Policy)) == [field.name for field in fields(Policy)]


# --- error codes ----------------------------------------------------------------------------------------


def used_codes(tree: ast.AST) -> Iterator[str]:
    """Codes of error classes, of refusals beside a status, and of verdicts that are made on the spot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
            for statement in node.body:
                if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "code":
                    yield ast.literal_eval(statement.value)
        elif isinstance(node, ast.Call):
            values = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("error_body", "unjudged", "_without") and values:
                yield str(values[0])
            if name in ("RefusedError", "QueueFullError", "HttpError") and len(values) > 1:
                yield str(values[1])
            if len(values) > 1 and isinstance(values[0], int) and 400 <= values[0] < 600:
                yield str(values[1])
            yield from (str(ast.literal_eval(word.value)) for word in node.keywords if is_code(word))


def is_code(keyword: ast.keyword) -> bool:
    return keyword.arg == "error_code" and isinstance(keyword.value, ast.Constant)


@pytest.mark.slow
def test_every_code_is_listed() -> None:
    trees = [ast.parse(path.read_text("utf-8")) for path in SOURCES]
    used = {code for tree in trees for code in used_codes(tree) if code.isidentifier() and code != "None"}
    assert len(used) > 30
    assert used - {item.code for item in ALL} - set(REMEDIES) == set()


def test_every_listed_code_is_used() -> None:
    text = "".join(path.read_text("utf-8") for path in SOURCES)
    assert [item.code for item in ALL if f'"{item.code}"' not in text] == []


def test_every_exception_has_a_remedy() -> None:
    assert {kind.code for kind in exceptions()} == set(REMEDIES)


def test_every_reason_of_the_grammar_is_listed() -> None:
    assert [item.code for item in GRAMMAR] == [reason.value for reason in Reason if reason is not Reason.ENGINE]


# --- words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "text"),
    [
        (Recipe, "name", "text"),
        (Recipe, "model", "section or null"),
        (NewModel, "vocab_size", "integer (>= 512)"),
        (ServiceConfig, "port", "integer (>= 0, <= 65,535)"),
        (ServiceConfig, "keys", "list of sections"),
        (ServiceConfig, "guards", "mapping of text to section"),
        (GuardSection, "thresholds", "list of 2, each number or null"),
        (GuardSection, "band", "list of 2 numbers or null"),
        (GuardSection, "long_input", "`refuse` or `windows`"),
    ],
)
def test_types_in_words(section: type[BaseModel], key: str, text: str) -> None:
    field = section.model_fields[key]
    assert type_text(field.annotation, field.metadata) == text


def test_cells_stay_cells() -> None:
    assert table(("a", "b"), [("x|y", "one\n  two")]) == "| a | b |\n| --- | --- |\n| x\\|y | one two |"
    assert table(("a",), []) == ""


def test_anchors_are_githubs() -> None:
    assert anchor("`data.sources[]`") == "datasources"
    assert anchor("POST /beta/litellm_basic_guardrail_api") == "post-betalitellm_basic_guardrail_api"


def test_every_link_leads_to_a_heading() -> None:
    for path in (ROOT / "docs" / "reference").glob("*.md"):
        text = path.read_text("utf-8")
        headings = {anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}
        links = {part.partition(")")[0] for part in text.split("](#")[1:]}
        assert links <= headings, path.name
