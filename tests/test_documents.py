"""The documents: what they name exists, their examples run, their commands parse, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml

from guardreasoner_vl.cli.app import app
from guardreasoner_vl.recipe import parse_recipe
from guardreasoner_vl.service.config import load_config
from guardreasoner_vl.sources.plain_rows import import_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "guardreasoner_vl"
EVIDENCE = DOCS / "evidence.md"
PAGES = sorted(DOCS.rglob("*.md"))
PROJECT_FILES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
ALL = [*PROJECT_FILES, *PAGES]
HAND_WRITTEN = [path for path in ALL if path.parent != DOCS / "reference"]
_NAMED = re.compile(r"`((?:tests/)?[\w/]+\.py)?((?:::\w+)*)`")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_VALUES = {"$mode": "fast", "USD": "50"}
_MODULE = re.compile(r"`([a-z_]+/[a-z_/]+\.py)`")


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of that language in a page."""
    return [text for name, text in _BLOCK.findall(path.read_text("utf-8")) if name == language]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def named_tests() -> list[tuple[str, str]]:
    """File and function of each test in the evidence; a name without a file belongs to the file before it."""
    tests: list[tuple[str, str]] = []
    for line in EVIDENCE.read_text("utf-8").splitlines():
        file = ""
        for path, functions in _NAMED.findall(line):
            file = path or file
            if functions and file.startswith("tests/"):
                tests.append((file, functions.rpartition("::")[2]))
    return tests


def test_the_tests_that_the_evidence_names_are_there() -> None:
    tests = named_tests()
    assert len(tests) > 150
    missing = [
        (file, function)
        for file, function in tests
        if not (ROOT / file).is_file()
        or not re.search(rf"^ *(async )?(def|class) {function}\b", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []


def test_every_file_that_the_evidence_names_is_there() -> None:
    paths = re.findall(r"`(tests/[\w/]+\.py)", EVIDENCE.read_text("utf-8"))
    assert [path for path in paths if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("number", range(4), ids=["source", "benchmark", "engine", "reward"])
def test_the_examples_of_extending_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = blocks(DOCS / "extend.md", "python")
    assert len(examples) == 4
    monkeypatch.chdir(tmp_path)
    exec(compile(examples[number], f"docs/extend.md, example {number + 1}", "exec"), {"__name__": "example"})


def test_the_examples_of_extending_are_short() -> None:
    lengths = [
        len([line for line in code.splitlines() if line.strip()]) for code in blocks(DOCS / "extend.md", "python")
    ]
    assert max(lengths) <= 30


def test_the_scripted_engine_of_the_guide_answers() -> None:
    [code] = [code for code in blocks(DOCS / "guard-an-app.md", "python") if "ScriptedEngine" in code]
    exec(compile(code, "docs/guard-an-app.md", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=named)
def test_python_in_the_documents_compiles(path: Path) -> None:
    for code in blocks(path, "python"):
        compile(code, named(path), "exec")


def test_the_recipe_for_own_data_is_one() -> None:
    recipe = parse_recipe(yaml.safe_load(blocks(DOCS / "own-data.md", "yaml")[0]))
    assert recipe.base.path == "embedded"
    assert [source.folder for source in recipe.data.sources] == ["rows"]


def test_the_rows_of_own_data_are_samples(tmp_path: Path) -> None:
    [rows] = blocks(DOCS / "own-data.md", "json")
    (tmp_path / "images").mkdir()
    (tmp_path / "rows.jsonl").write_text(rows, "utf-8")
    report = import_rows(tmp_path / "rows.jsonl", tmp_path / "rows", "own")
    assert (report.rows, report.skipped.total) == (4, 0)


def test_the_configuration_of_the_service_is_one(tmp_path: Path) -> None:
    without_file = blocks(DOCS / "service.md", "yaml")[0].replace(", calibration: calibration.json, preset: strict", "")
    (tmp_path / "service.yaml").write_text(without_file, "utf-8")
    config = load_config(tmp_path / "service.yaml")
    assert (config.request.mode, config.response.mode) == ("enforce", "monitor")
    assert [key.name for key in config.keys] == ["shop", "chat"]


def tree() -> dict[str, str]:
    """The lines of the README's tree below the package: name and purpose."""
    lines = re.search(
        r"```\nsrc/guardreasoner_vl/\n(.*?)^\w", (ROOT / "README.md").read_text("utf-8"), re.M | re.DOTALL
    )
    assert lines is not None
    return dict(re.findall(r"^  (\S+) +(.+)$", lines[1], re.MULTILINE))


def entries() -> set[str]:
    """The modules and folders of the package, folders with a slash at the end."""
    files = {path.name for path in PACKAGE.glob("*.py")}
    return files | {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}


def test_the_tree_in_the_readme_is_that_of_the_package() -> None:
    assert set(tree()) == entries()


def test_the_architecture_names_every_room() -> None:
    rooms = set(re.findall(r"^\| `([\w./]+)` \|", (DOCS / "architecture.md").read_text("utf-8"), re.MULTILINE))
    assert rooms == entries() - {"__init__.py"}


def test_modules_that_the_architecture_names_are_there() -> None:
    modules = _MODULE.findall((DOCS / "architecture.md").read_text("utf-8"))
    assert len(modules) > 50
    missing = [name for name in modules if not ((PACKAGE / name).is_file() or (ROOT / name).is_file())]
    assert missing == []


def test_the_order_of_imports_is_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    [figure] = blocks(ROOT / "README.md", "mermaid")
    line = figure.splitlines()[1]
    assert [re.sub(r'^\w+\["(.*)"\]$', r"\1", part.strip()) for part in line.split("-->")] == layers
    [order] = blocks(DOCS / "architecture.md", "text")
    assert order.splitlines() == layers


def _placeholders_filled(words: list[str]) -> list[str]:
    """The words without redirections, with values for placeholders."""
    line = re.sub(r" [<>] \S+", "", "\0".join(words).replace("\0<\0", " < ").replace("\0>\0", " > "))
    return [_VALUES.get(word, word) for word in line.split("\0")]


def console_commands() -> Iterator[tuple[str, list[str]]]:
    """Every `guardreasoner-vl` line of a console block: where it stands, and its words."""
    for path in HAND_WRITTEN:
        for block in blocks(path, "console"):
            for line in re.sub(r" *\\\n *", " ", block).splitlines():
                for part in re.split(r"; |&& |\| ", line.removeprefix("$ ")):
                    words = re.sub(r"^(do )?(\w+=\S+ )*", "", part.strip())
                    if words.startswith("guardreasoner-vl "):
                        yield named(path), _placeholders_filled(shlex.split(words, comments=True)[1:])


@pytest.mark.parametrize(
    ("place", "words"), list(console_commands()), ids=lambda value: value if isinstance(value, str) else value[0]
)
def test_commands_in_the_documents_parse(place: str, words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    context = group.make_context("guardreasoner-vl", words)
    if words[0].startswith("--"):
        return
    while hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, words, parent=context)
    assert context.command is group, place


def slug(heading: str) -> str:
    """The anchor of a heading, as the site makes it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower())


@pytest.mark.parametrize("path", ALL, ids=named)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in _LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE)
            if anchor not in map(slug, headings):
                broken.append(link)
    assert broken == []


def test_pages_link_to_pages_alone() -> None:
    """A link out of `docs/` leads nowhere on the site."""
    outside = [
        (named(path), link)
        for path in PAGES
        for link in _LINK.findall(path.read_text("utf-8"))
        if link.startswith("../") and not (path.parent / link.partition("#")[0]).resolve().is_relative_to(DOCS)
    ]
    assert outside == []


def test_the_navigation_lists_every_page() -> None:
    def pages(part: Any) -> Iterator[str]:
        if isinstance(part, str):
            yield part
        else:
            for item in part.values() if isinstance(part, dict) else part:
                yield from pages(item)

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_no_page_of_the_site_has_a_mermaid_figure() -> None:
    """The site's theme would load the script that draws it from elsewhere."""
    assert [named(path) for path in PAGES if blocks(path, "mermaid")] == []


def test_citation_has_the_version_and_the_paper() -> None:
    from guardreasoner_vl import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert "2505.11049" in citation["references"][0]["url"]
