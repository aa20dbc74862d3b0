"""Rows of a recipe's sources: filtered, limited, repeated, never held-out ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from guardreasoner_vl.errors import DataError
from guardreasoner_vl.recipe import DataSection
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.sources.mixture import Mixture, build_mixture

COUNT = 200


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    rows = [
        {
            "id": f"toy-{number}",
            "source": "inner-a" if number % 2 else "inner-b",
            "modality": "text",
            "prompt": f"prompt {number}",
            "request_label": "harmful" if number % 3 else "unharmful",
            "meta": {"weak": number % 4 == 0, "kind": number % 5},
        }
        for number in range(COUNT)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    return tmp_path / "data"


def mixed(root: Path, seed: int = 0, synthetic_images: dict[str, int] | None = None, **source: Any) -> Mixture:
    section = {"folder": "toy", "origin": "made up", "licence": "CC0", **source}
    data = DataSection.model_validate({"sources": [section], "synthetic_images": synthetic_images})
    return build_mixture(data, root, root.parent / "work", seed)


ALL = [f"toy-{number}" for number in range(COUNT)]
TRAIN = [name for name in ALL if not is_held_out(name)]


def test_held_out_rows_are_never_trained_on(root: Path) -> None:
    mixture = mixed(root, weak_share=1)
    assert [row.id for row in mixture.train] == TRAIN
    assert [row.id for row in mixture.held_out] == [name for name in ALL if is_held_out(name)]
    assert mixture.held_out
    assert mixture.skipped.reasons == {"not JSON": 1}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_share_of_validation_rows_can_be_set(root: Path, share: float) -> None:
    section = {"folder": "toy", "origin": "made up", "licence": "CC0", "weak_share": 1, "test_share": 0.3}
    data = DataSection.model_validate({"sources": [section], "validation_share": share})
    first, other_seed = (build_mixture(data, root, root.parent / "work", seed) for seed in (0, 1))
    parts = [[row.id for row in rows] for rows in (first.train, first.held_out, first.test)]
    assert sorted(name for part in parts for name in part) == sorted(ALL)
    # of the rows that are not test rows, as both are drawn for themselves: 200 x 0.7 x 0.3 = 42
    assert 28 <= len(parts[1]) <= 56 if share else not parts[1]
    assert ([row.id for row in other_seed.held_out] == parts[1]) == (share == 0)


def test_rows_go_under_their_folders_name(root: Path) -> None:
    assert {row.source for row in mixed(root).train} == {"toy"}


def test_only_reads_fields_and_meta(root: Path) -> None:
    assert {int(row.id.split("-")[1]) % 2 for row in mixed(root, only={"source": ["inner-a"]}).train} == {1}
    kept = mixed(root, only={"kind": ["1", "3"], "request_label": ["harmful"]}).train
    assert {row.meta["kind"] for row in kept} == {1, 3}
    assert {row.request_label for row in kept} == {"harmful"}
    assert all(row.meta["kind"] == 2 for row in mixed(root, only={"kind": ["2"]}).held_out)


def test_only_that_lets_nothing_through_is_a_mistake(root: Path) -> None:
    with pytest.raises(DataError, match=r"toy: no row passes the recipe's `only`"):
        mixed(root, only={"source": ["inner-c"]})


def test_limit_draws_among_the_kept_rows(root: Path) -> None:
    drawn = [row.id for row in mixed(root, limit=20).train]
    assert len(drawn) == len(set(drawn)) == 20
    assert set(drawn) <= set(TRAIN)
    assert drawn == [row.id for row in mixed(root, limit=20).train]
    assert set(drawn) != {row.id for row in mixed(root, seed=1, limit=20).train}
    assert len(mixed(root, limit=10_000, weak_share=1).train) == len(TRAIN)
    assert mixed(root, limit=1).held_out == mixed(root).held_out


def test_weak_share(root: Path) -> None:
    def weak(share: float, seed: int = 0) -> list[str]:
        return [row.id for row in mixed(root, seed, weak_share=share).train if row.meta["weak"]]

    everything = weak(1)
    assert weak(0) == []
    assert set(weak(0.5)) < set(everything)
    assert 0.2 * len(everything) < len(weak(0.5)) < 0.8 * len(everything)
    assert weak(0.5) == weak(0.5)
    assert weak(0.5) != weak(0.5, seed=1)
    strong = [row.id for row in mixed(root, weak_share=0).train]
    assert strong == [name for name in TRAIN if int(name.split("-")[1]) % 4]


def test_repeat(root: Path) -> None:
    once, thrice = mixed(root), mixed(root, repeat=3)
    assert Counter(row.id for row in thrice.train) == {row.id: 3 for row in once.train}
    assert thrice.held_out == once.held_out


def test_missing_folder(root: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no train\.jsonl"):
        mixed(root, folder="nowhere")


def test_a_missing_folder_is_refused_even_where_no_source_is_read(tmp_path: Path) -> None:
    data = DataSection.model_validate({"synthetic_exchanges": {"count": 3}})
    with pytest.raises(DataError, match="nowhere: no such folder; give as --data"):
        build_mixture(data, tmp_path / "nowhere", tmp_path / "work", 0)
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_drawn_images_are_drawn_once_and_split_like_the_rest(root: Path) -> None:
    mixture = mixed(root, only={"kind": ["1"]}, synthetic_images={"count": 40, "repeat": 2})
    (folder,) = (root.parent / "work").iterdir()
    train = [row for row in mixture.train if row.source == "drawn"]
    held_out = [row for row in mixture.held_out if row.source == "drawn"]
    assert len(train) == 2 * len({row.id for row in train})
    assert len({row.id for row in train}) + len(held_out) == 40
    assert not any(is_held_out(row.id) for row in train)
    assert all(Path(row.images[0]).is_file() for row in train)
    stamp = (folder / "train.jsonl").stat().st_mtime_ns
    assert mixed(root, only={"kind": ["1"]}, synthetic_images={"count": 40, "repeat": 2}).train == mixture.train
    assert (folder / "train.jsonl").stat().st_mtime_ns == stamp


def test_drawing_that_was_cut_off_is_done_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            mixed(root, synthetic_images={"count": 3})
    rows = [row for row in mixed(root, synthetic_images={"count": 3}).train if row.source == "drawn"]
    assert {row.id for row in rows} <= {f"drawn-0-{number:06d}" for number in range(3)}


def test_what_is_known_about_images_is_noted(root: Path) -> None:
    folder = root / "images"
    folder.mkdir()
    row = {"id": "p", "source": "s", "modality": "image", "images": ["p.png"], "meta": {"caption": "some words"}}
    bare = {**row, "id": "q", "meta": {}}
    text = {"id": "text", "source": "s", "modality": "text", "prompt": "x"}
    (folder / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in (row, bare, text)))
    rows = mixed(root, folder="images", image_kind="a meme", image_text="caption").train
    assert [entry.meta for entry in rows] == [
        {"caption": "some words", "image_kind": "a meme", "image_text": "some words"},
        {"image_kind": "a meme", "image_text": ""},
        {},
    ]


@pytest.mark.slow
def test_only_the_named_modalities(root: Path) -> None:
    section = {"folder": "toy", "origin": "made up", "licence": "CC0"}
    mixtures = {
        modalities: build_mixture(
            DataSection.model_validate(
                {"sources": [section], "synthetic_images": {"count": 60}, "modalities": modalities}
            ),
            root,
            root.parent / "-".join(modalities),
            0,
        )
        for modalities in (("text",), ("image",), ("text", "image", "text-image"))
    }
    kinds = {
        names: ({row.modality for row in mixture.train}, {row.modality for row in mixture.held_out})
        for names, mixture in mixtures.items()
    }
    assert kinds[("text",)] == ({"text"}, {"text"})
    assert kinds[("image",)] == ({"image"}, {"image"})
    assert kinds[("text", "image", "text-image")][0] == {"text", "image", "text-image"}
    assert not (root.parent / "text").exists()  # nothing was drawn for texts
