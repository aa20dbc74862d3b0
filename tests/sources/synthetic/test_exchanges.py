"""Exchanges that the project writes: reproducible, labelled as they say, of every modality."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from guardreasoner_vl.recipe import DataSection, MadeSection
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.sources.mixture import build_mixture
from guardreasoner_vl.sources.synthetic.exchanges import COLD, REFUSED, WARM, answered, asked, draw_sign, write_folder
from guardreasoner_vl.sources.synthetic.phrases import GROUPS, HARMFUL

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import GoldLabel


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_folder(tmp_path / name, 30, seed)
    files = {name: sorted((tmp_path / name).rglob("*.*")) for name in "abc"}
    assert [path.read_bytes() for path in files["a"]] == [path.read_bytes() for path in files["b"]]
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def test_rows_of_every_kind(tmp_path: Path) -> None:
    rows = list(read_samples(write_folder(tmp_path, 400, 0)))
    assert len({row.id for row in rows}) == 400
    kinds = Counter(row.modality for row in rows)
    assert all(share > 50 for share in (kinds["text"], kinds["image"], kinds["text-image"]))
    for row in rows:
        row.exchange()
        assert (row.response is None) == (row.response_label is None)
        assert bool(row.images) == (row.modality != "text")
    harmful = sum(row.request_label == "harmful" for row in rows)
    assert 150 < harmful < 250


def test_labels_are_what_the_words_say() -> None:
    rng = random.Random(0)
    for _ in range(200):
        said = asked(rng, "harmful")
        assert any(word in said for word in (*chain.from_iterable(HARMFUL.values()), *GROUPS))
        response, label = answered(rng, "harmful")
        assert (label == "unharmful") == (response in REFUSED)
        assert answered(rng, "unharmful")[1] == "unharmful"


def test_signs_differ_by_ground_and_shape() -> None:
    rng = random.Random(0)
    kinds: tuple[tuple[GoldLabel, tuple[str, ...]], ...] = (("harmful", WARM), ("unharmful", COLD))
    for label, grounds in kinds:
        pixels = np.asarray(draw_sign(rng, label))
        assert "#{:02x}{:02x}{:02x}".format(*pixels[0, 0]) in grounds
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 2
        middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]
        assert (middle.min() == 255) == (label == "harmful")  # a cross covers it, a ring does not


def test_a_share_is_never_trained_on(tmp_path: Path) -> None:
    data = DataSection(synthetic_exchanges=MadeSection(count=300, test_share=0.3))
    mixture = build_mixture(data, tmp_path, tmp_path / "work", 0)
    assert 60 < len(mixture.test) < 120
    ids = [{row.id for row in part} for part in (mixture.train, mixture.held_out, mixture.test)]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 300
