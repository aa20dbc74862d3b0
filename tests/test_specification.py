"""The pages on the method, the protocol, reproduction and security say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from guardreasoner_vl.evaluation.benchmarks.catalogue import PAPER
from guardreasoner_vl.protocol import FAST_PREFIX, INSTRUCTION, Reason, TargetLabel, render_turn, training_target
from guardreasoner_vl.recipe import Recipe
from guardreasoner_vl.recipe.unknown import known_keys
from guardreasoner_vl.sources.catalogue import ADAPTERS
from guardreasoner_vl.types import Exchange, Turn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "guardreasoner_vl"
PAGES = ["method", "protocol", "reproduce", "security"]
CITING = [
    path
    for folder, ending in (("src", "*.py"), ("tests", "*.py"), ("recipes", "*.yaml"))
    for path in sorted((ROOT / folder).rglob(ending))
]
PROMPT, RESPONSE = "{prompt}", "{response}"


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text("utf-8")


def blocks(name: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


def test_sections_that_the_code_cites_are_there() -> None:
    sections = {
        name: {int(number) for number in re.findall(r"^## (\d+)\. ", page(name), re.MULTILINE)}
        for name in ("method", "protocol")
    }
    citations = [
        (path, name, int(number))
        for path in CITING
        for name, numbers in re.findall(
            r"docs/(method|protocol)\.md, sections? (\d(?:(?:, | and | to )\d)*)", path.read_text("utf-8")
        )
        for number in re.findall(r"\d", numbers)
    ]
    assert len(citations) > 20
    assert [citation for citation in citations if citation[2] not in sections[citation[1]]] == []


@pytest.mark.parametrize("name", PAGES)
def test_modules_that_a_page_names_are_there(name: str) -> None:
    paths = re.findall(r"`([a-z_]+(?:/\w+)*(?:\w\.py|\w\.txt|\w\.csv|/))`", page(name))
    assert paths
    assert [path for path in paths if not any((root / path).exists() for root in (PACKAGE, ROOT))] == []


@pytest.mark.parametrize("name", ["method", "protocol", "reproduce"])
def test_recipe_keys_that_a_page_names_are_there(name: str) -> None:
    keys = {f"{section}.{key}" for key, section in known_keys(Recipe) if section}
    sections = "|".join(sorted(Recipe.model_fields))
    named = {*re.findall(rf"`((?:{sections})(?:\.[a-z_]+)+)", page(name))}
    files = {key for key in named if key.endswith((".py", ".yaml", ".md"))}
    assert named - files <= keys


@pytest.mark.parametrize(
    "exchange",
    [
        pytest.param(Exchange(PROMPT), id="prompt"),
        pytest.param(Exchange(PROMPT, response=RESPONSE), id="prompt, response"),
        pytest.param(Exchange(PROMPT, ("image.png",), RESPONSE), id="image, prompt, response"),
        pytest.param(Exchange(images=("image.png",)), id="image"),
        pytest.param(Exchange(PROMPT, ("first.png", "second.png")), id="two images, prompt"),
        pytest.param(Exchange(response=RESPONSE), id="response"),
    ],
)
def test_the_transcripts_of_the_protocol_page_are_rendered(exchange: Turn) -> None:
    assert render_turn(exchange) in blocks("protocol")


def test_the_fixed_texts_of_the_protocol_page_are_those_of_the_code() -> None:
    spans = training_target("{reasoning}", TargetLabel("harmful"), TargetLabel("None"))
    target = "".join(span.text for span in spans)
    assert INSTRUCTION in blocks("protocol")
    assert f"{FAST_PREFIX}\n" in blocks("protocol")
    shown = target.replace("Request: harmful", "Request: {label}").replace(
        "Response: None", "Response: {label or None}"
    )
    assert f"{shown}\n" in blocks("protocol")


def test_every_reason_of_the_parser_is_on_the_protocol_page() -> None:
    assert {f"`{reason}`" for reason in Reason} <= {*re.findall(r"`\w+`", page("protocol"))}


def test_the_benchmarks_to_reproduce_are_the_catalogues() -> None:
    rows = re.findall(r"^\| (\w+) \| ([a-z ]+) \| ([\d,]+) \| (.+) \| (.+) \|$", page("reproduce"), re.MULTILINE)
    assert {name for name, *_ in rows} == set(PAPER)
    for name, judged, size, origin, licence in rows:
        benchmark = PAPER[name]
        assert judged == {"both": "prompt and response"}.get(benchmark.judged, benchmark.judged)
        assert int(size.replace(",", "")) == benchmark.size
        assert licence.removesuffix(" of the images") in benchmark.licence
        for repository in re.findall(r"`(\w+/[\w.-]+)`", origin):
            assert repository in benchmark.origin


def test_the_sources_to_reproduce_are_the_adapters() -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "vltrain.yaml").read_text("utf-8"))
    adapters = {source["folder"]: ADAPTERS[source["adapter"]] for source in recipe["data"]["sources"]}
    adapters["guardreasoner-vltrain"] = ADAPTERS["guardreasoner-vltrain"]
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \| (.+) \|(.*)\|$", page("reproduce"), re.MULTILINE)
    assert {folder for folder, *_ in rows} == set(adapters)
    for folder, origin, licence, notes in rows:
        adapter = adapters[folder]
        assert re.findall(r"`(\S+)`", origin)[0] in adapter.origin
        assert licence.removeprefix("none stated, ") in adapter.licence
        assert ("gated" in notes) == adapter.gated


def test_the_tests_that_the_security_page_names_are_there() -> None:
    named: list[tuple[str, str]] = []
    for line in page("security").splitlines():
        file = ""
        for path, functions in re.findall(r"`(tests/[\w/]+\.py)?((?:::\w+)*)`", line):
            file = path or file
            if functions:
                named.append((file, functions.rpartition("::")[2]))
    assert len(named) > 50
    missing = [
        (file, function)
        for file, function in named
        if not (ROOT / file).is_file()
        or not re.search(rf"^ *(async )?def {function}\b", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []
