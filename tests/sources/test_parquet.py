"""Samples as Parquet rows: nothing is lost, images by path or inside, and `datasets` reads them too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.parquet import IMAGES, read_parquet, write_parquet
from guardreasoner_vl.types import Provenance, Sample

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LABELS = st.sampled_from(["harmful", "unharmful", None])
META = st.dictionaries(
    TEXTS.filter(lambda name: name not in Provenance.model_fields),
    TEXTS | st.integers(-5, 5) | st.booleans() | st.lists(TEXTS, max_size=2),
    max_size=3,
)
SAMPLES = st.builds(
    Sample,
    id=TEXTS,
    source=TEXTS,
    split=st.sampled_from(["train", "validation", "test"]),
    modality=st.just("text"),
    prompt=TEXTS,
    response=TEXTS | st.none(),
    request_label=LABELS,
    response_label=LABELS,
    reasoning=TEXTS | st.none(),
    meta=META,
)


@pytest.mark.slow
@given(st.lists(SAMPLES, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_any_rows_come_back_as_they_were(tmp_path: Path, samples: list[Sample]) -> None:
    assert write_parquet(tmp_path / "rows.parquet", samples) == len(samples)
    assert list(read_parquet(tmp_path / "rows.parquet")) == samples


def with_images(folder: Path) -> Sample:
    path = folder / "red.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)
    return Sample(id="a", source="toy", modality="image", images=(str(path),), request_label="unharmful")


def test_images_by_reference_are_found_again_where_the_folder_moves(tmp_path: Path) -> None:
    inside, outside = with_images(tmp_path / "one" / IMAGES), with_images(tmp_path / "elsewhere")
    write_parquet(tmp_path / "one" / "rows.parquet", [inside, outside])
    (tmp_path / "one").rename(tmp_path / "two")
    moved, stayed = read_parquet(tmp_path / "two" / "rows.parquet")
    assert moved.images == (str(tmp_path / "two" / IMAGES / "red.png"),)
    assert Path(moved.images[0]).is_file()
    assert stayed.images == outside.images


def test_images_inside_need_nothing_beside(tmp_path: Path) -> None:
    sample = with_images(tmp_path / "data")
    content = Path(sample.images[0]).read_bytes()
    path = tmp_path / "corpus" / "rows.parquet"
    write_parquet(path, [sample, sample.model_copy(update={"id": "b"})], embed=True)
    Path(sample.images[0]).unlink()
    rows = list(read_parquet(path))
    assert Path(rows[0].images[0]).read_bytes() == content
    assert len(list((tmp_path / "corpus" / IMAGES).iterdir())) == 1
    with pytest.raises(DataError, match=r"red.png: cannot be read .*; restore it"):
        write_parquet(path, [sample], embed=True)
    assert [row.id for row in read_parquet(path)] == ["a", "b"]  # the old file stays
    assert sorted(one.name for one in path.parent.iterdir()) == [IMAGES, "rows.parquet"]


def test_the_hubs_library_decodes_the_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra train is not installed")
    write_parquet(tmp_path / "rows.parquet", [with_images(tmp_path)], embed=True)
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert dataset[0]["images"][0].size == (8, 8)
    assert dataset[0]["request_label"] == "unharmful"


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="cannot be read to its end"):
        list(read_parquet(tmp_path / "rows.parquet"))
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\); check the path"):
        list(read_parquet(tmp_path / "missing.parquet"))
