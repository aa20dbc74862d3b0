"""A corpus in other layouts, and back again without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from guardreasoner_vl.choices import ExportLayout
from guardreasoner_vl.corpus.export import ADAPTERS, export
from guardreasoner_vl.corpus.store import CorpusInfo, write_corpus
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.sources.adapters import read_source
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.types import Provenance
from tests.builders import sample
from tests.corpus.test_stats import REASONING

if TYPE_CHECKING:
    from guardreasoner_vl.types import Sample

LAYOUTS: tuple[ExportLayout, ...] = get_args(ExportLayout)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MARKED = st.sampled_from(["<think>", "None", "Human user:", "a\n\nAI assistant:\nb", "<image>", "<|im_end|>"])


def written(folder: Path, *rows: Sample) -> Path:
    write_corpus(folder, CorpusInfo(name="toy"), rows)
    return folder


def back(folder: Path, layout: ExportLayout) -> list[Sample]:
    skipped = SkippedRows()
    rows = list(read_source(adapter_named(ADAPTERS[layout]), folder, folder / "unpacked", skipped))
    assert skipped.reasons == {}
    return rows


def without_paths(row: Sample) -> Sample:
    return row.model_copy(update={"images": tuple(Path(path).name for path in row.images)})


@pytest.fixture
def rows(tmp_path: Path) -> list[Sample]:
    paths = []
    for name, colour in (("one", "red"), ("two", "blue")):
        path = tmp_path / name / "same.png"
        path.parent.mkdir()
        Image.new("RGB", (8, 8), colour).save(path)
        paths.append(str(path))
    return [
        sample("a", request_label="unharmful", reasoning=REASONING, meta={"category": "bread"}),
        sample("b", request_label="harmful", response="Mix.", response_label="unharmful", reasoning=REASONING),
        sample("c", request_label=None, response="Mix.", response_label="harmful", reasoning=REASONING, split="test"),
        sample("d", modality="image", prompt="", images=tuple(paths[:1]), request_label="harmful"),
        sample("e", modality="text-image", images=tuple(paths), request_label="harmful", reasoning=REASONING),
        sample("f", prompt="<think> None", request_label="harmful", reasoning="no heading"),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_lost(rows: list[Sample], layout: ExportLayout, tmp_path: Path) -> None:
    assert export(written(tmp_path / "corpus", *rows), layout, tmp_path / "out") == len(rows)
    restored = sorted(back(tmp_path / "out", layout), key=lambda row: row.id)
    assert [without_paths(row) for row in restored] == [without_paths(row) for row in rows]
    colours = {Image.open(path).getpixel((0, 0)) for path in restored[4].images}
    assert colours == {(255, 0, 0), (0, 0, 255)}  # equal names of two folders are two images


def test_the_authors_layout(rows: list[Sample], tmp_path: Path) -> None:
    export(written(tmp_path / "corpus", *rows), "guardreasoner", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {"Text.json", "Image.json", "TextImage.json"}
    texts = json.loads((tmp_path / "out" / "Text.json").read_text())
    roles = [(message["role"], message["content"]) for message in texts[0]["messages"]]
    assert roles == [
        ("system", INSTRUCTION),
        ("user", "Human user:\nbread?\n\nAI assistant:\nNone\n"),
        (
            "assistant",
            f"<think>\n{REASONING}\n</think>\n<result>\nAnswers:\nRequest: unharmful\nResponse: None\n</result>",
        ),
    ]
    assert "Request:" not in texts[2]["messages"][2]["content"]  # a label that is not known has no line
    (both,) = json.loads((tmp_path / "out" / "TextImage.json").read_text())
    assert both["messages"][1]["content"].startswith("Human user:\n<image>\n<image>\nbread?")
    assert all((tmp_path / "out" / name).is_file() for name in both["images"])


def test_llama_factory_finds_the_rows(rows: list[Sample], tmp_path: Path) -> None:
    export(written(tmp_path / "corpus", *rows), "sharegpt", tmp_path / "out")
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())["guardreasoner"]
    content = json.loads((tmp_path / "out" / info["file_name"]).read_text())
    assert len(content) == len(rows)
    assert all(column in content[0] for column in info["columns"].values())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    corpus = written(tmp_path / "corpus", sample("a"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="not empty; name a new folder"):
        export(corpus, "sharegpt", tmp_path / "out")


@pytest.mark.slow
@example(sample("a", response="None", request_label="harmful", reasoning=""), "guardreasoner")
@given(
    st.builds(
        sample,
        name=st.just("a"),
        prompt=TEXTS | MARKED,
        response=TEXTS | MARKED | st.none(),
        request_label=st.sampled_from(["harmful", "unharmful", None]),
        response_label=st.sampled_from(["harmful", "unharmful", None]),
        reasoning=TEXTS | MARKED | st.none() | st.just(REASONING),
        meta=st.dictionaries(TEXTS.filter(lambda name: name not in Provenance.model_fields), TEXTS, max_size=2),
    ).filter(lambda row: (row.prompt + (row.response or "")).strip()),
    st.sampled_from(LAYOUTS),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_any_row_is_read_back_unchanged(
    tmp_path_factory: pytest.TempPathFactory, row: Sample, layout: ExportLayout
) -> None:
    folder = tmp_path_factory.mktemp("export")
    export(written(folder / "corpus", row), layout, folder / "out")
    assert back(folder / "out", layout) == [row]
