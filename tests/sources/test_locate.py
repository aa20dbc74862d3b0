"""Where a data set lies: a folder, or the hub's cache, pinned."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.sources.adapters import read_source
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.locate import locate, revision_of
from guardreasoner_vl.sources.skipped import SkippedRows
from tests.builders import write_records

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WILDGUARD = adapter_named("wildguardtrain")


@pytest.fixture
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache with one commit of one data set, and no network."""
    snapshot = tmp_path / "hub" / "datasets--allenai--wildguardmix" / "snapshots" / COMMIT
    row = {"prompt": "bread?", "response": None, "prompt_harm_label": "unharmful", "response_harm_label": None}
    write_records(snapshot, "train/wildguard_train.parquet", [row])
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_hub")
def test_a_pinned_set_comes_from_the_hub(tmp_path: Path) -> None:
    folder = locate(f"hub:allenai/wildguardmix@{COMMIT}", Path("unused"), WILDGUARD)
    rows = list(read_source(WILDGUARD, folder, tmp_path, SkippedRows()))
    assert [(row.prompt, row.request_label) for row in rows] == [("bread?", "unharmful")]
    assert revision_of(f"hub:allenai/wildguardmix@{COMMIT}") == COMMIT


@pytest.mark.usefixtures("_hub")
def test_a_gated_set_that_is_not_there_says_how_to_get_it() -> None:
    with pytest.raises(DataError, match=r"HF_HUB_OFFLINE is set.* its terms there \(huggingface-cli login\)"):
        locate(f"hub:allenai/other@{COMMIT}", Path("unused"), WILDGUARD)
    with pytest.raises(DataError, match="no revision; give hub:allenai/wildguardmix@REVISION"):
        locate("hub:allenai/wildguardmix", Path("unused"), WILDGUARD)


def test_a_folder_is_below_the_root(tmp_path: Path) -> None:
    assert locate("some/folder", tmp_path) == tmp_path / "some" / "folder"
    assert revision_of("some/folder") is None
    with pytest.raises(DataError, match=r"no train/wildguard_train.parquet for .*; get it from hub allenai"):
        list(read_source(WILDGUARD, locate("nowhere", tmp_path, WILDGUARD), tmp_path, SkippedRows()))
