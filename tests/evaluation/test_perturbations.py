"""Changes that keep the labels, and the flips that they bring about."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl.errors import DataError, ImageError
from guardreasoner_vl.evaluation.benchmarks.find import from_file
from guardreasoner_vl.evaluation.metrics import Counts
from guardreasoner_vl.evaluation.perturbations import BENIGN, CYRILLIC, LATIN, NAMES, ZERO_WIDTH, perturbed
from guardreasoner_vl.images.decode import checked_images
from guardreasoner_vl.stages import robustness
from guardreasoner_vl.types import Sample
from tests.builders import prediction
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from pathlib import Path

TEXT = "Explain how to open a bank account, please"


def sample(**fields: Any) -> Sample:
    return Sample(
        **{"id": "../a", "source": "t", "modality": "text", "prompt": TEXT, "request_label": "unharmful", **fields}
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_change_is_the_same_every_time_and_keeps_the_truth(name: str, tmp_path: Path) -> None:
    image = tmp_path / "given.png"
    Image.new("RGB", (60, 60), "red").save(image)
    original = sample(images=(str(image),), modality="text-image", response="Here.")
    first, second = perturbed(name, original, tmp_path), perturbed(name, original, tmp_path)
    assert first == second
    assert first is not None
    assert first != original
    assert (first.id, first.request_label, first.response) == (original.id, "unharmful", "Here.")


def test_texts_are_changed_as_their_names_say(tmp_path: Path) -> None:
    def text(name: str) -> str:
        changed = perturbed(name, sample(), tmp_path)
        assert changed is not None
        return changed.prompt

    assert text("padded before").endswith(f"\n\n{TEXT}")
    assert text("padded after").startswith(f"{TEXT}\n\n")
    assert any(sentence in text("padded after") for sentence in BENIGN)
    assert text("zero-width").replace(ZERO_WIDTH, "") == TEXT
    assert text("homoglyphs").translate(str.maketrans(CYRILLIC, LATIN)) == TEXT
    assert text("homoglyphs") != TEXT
    assert text("upper case") == TEXT.upper()
    assert text("forged result").startswith(TEXT)


def test_words_are_drawn_instead_of_written(tmp_path: Path) -> None:
    changed = perturbed("rendered", sample(), tmp_path)
    assert changed is not None
    assert (changed.prompt, changed.modality) == ("", "image")
    (page,) = changed.images
    assert page.startswith(str(tmp_path))
    assert ".." not in page
    colours = checked_images(page)[0].open().getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 1


def test_what_does_not_apply_is_left_out(tmp_path: Path) -> None:
    assert perturbed("upper case", sample(prompt="", response="x"), tmp_path) is None
    assert perturbed("upper case", sample(prompt="LOUD"), tmp_path) is None
    assert perturbed("rendered", sample(prompt="x" * 1201), tmp_path) is None
    assert perturbed("re-encoded", sample(), tmp_path) is None
    with pytest.raises(ImageError):
        perturbed("re-encoded", sample(images=("missing.png",)), tmp_path)


def test_flips_by_hand() -> None:
    words = {"h": "harmful", "u": "unharmful", "e": "error"}
    golds, olds, news = "hhuuuh", "hhuuuu", "uhhueu"
    before = {
        ("toy", str(at)): prediction(str(at), words[g], words[o])
        for at, (g, o) in enumerate(zip(golds, olds, strict=True))
    }
    after = {
        ("toy", str(at)): prediction(str(at), words[g], words[n])
        for at, (g, n) in enumerate(zip(golds, news, strict=True))
    }
    after["toy", "unknown"] = prediction("unknown", "harmful", "harmful")
    flips = robustness.flips(before, after, "request")
    assert (flips.rows, flips.evaded, flips.raised, flips.failed) == (6, 1, 1, 1)
    assert flips.rate == 0.5
    assert flips.before == Counts(true_positive=2, true_negative=3, false_negative=1)
    assert flips.after == Counts(true_positive=1, false_positive=2, true_negative=1, false_negative=2, errors=1)
    assert robustness.flips(before, after, "response").rate is None


def test_the_stage_tells_which_changes_break_a_guard(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"id": "a", "source": "t", "modality": "text", "prompt": "a BAD idea", "request_label": "harmful"},
        {"id": "b", "source": "t", "modality": "text", "prompt": "a bad cake", "request_label": "unharmful"},
        {"id": "c", "source": "t", "modality": "image", "images": ["missing.png"], "request_label": "unharmful"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard, loaded = scripted_guard(), [from_file(path)]
    flips = robustness.run(guard, loaded, tmp_path / "out")["request"]
    assert flips["padded before"].rate == 0
    assert (flips["upper case"].raised, flips["upper case"].rows) == (1, 2)  # it looks for BAD
    assert (flips["rendered"].evaded, flips["rendered"].rows) == (1, 2)  # and reads no images
    assert flips["re-encoded"].rows == 0
    written = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert written["request"]["upper case"]["raised"] == 1
    lines = robustness.flips_table(flips)
    assert next(line for line in lines if line[0] == "upper case")[:3] == ["upper case", "2", "50.0"]
    assert not any(line[0] == "re-encoded" for line in lines)
    asked = len(guard.engine.requests)  # type: ignore[attr-defined]
    robustness.run(guard, loaded, tmp_path / "out")
    assert len(guard.engine.requests) == asked  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no change named odd"):
        robustness.run(guard, loaded, tmp_path / "out", names=["odd"])
