"""Duplicates, contradictions and decontamination: every rule on made-up rows, Jaccard indices computed by hand."""

from __future__ import annotations

import json
import random
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw, ImageFont

from guardreasoner_vl.errors import InputError, MissingExtraError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.sources import fingerprints as module
from guardreasoner_vl.sources.duplicates import Deduplicated, bands, without_duplicates
from guardreasoner_vl.sources.fingerprints import (
    ImageMark,
    fingerprints,
    image_marks,
    jaccard,
    normalised,
    shingles,
)
from guardreasoner_vl.types import GoldLabel, Sample

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("datasketch")
pytest.importorskip("imagehash")

BAD: GoldLabel = "harmful"
FINE: GoldLabel = "unharmful"
CAKE = " ".join(f"cake{number}" for number in range(24))  # 24 words, 20 shingles


def row(
    name: str,
    prompt: str = "",
    response: str | None = None,
    labels: tuple[GoldLabel | None, GoldLabel | None] = (None, None),
    images: tuple[Path, ...] = (),
    source: str = "corpus",
) -> Sample:
    return Sample(
        id=name,
        source=source,
        modality="text-image" if images and prompt else "image" if images else "text",
        prompt=prompt,
        response=response,
        images=tuple(map(str, images)),
        request_label=labels[0],
        response_label=labels[1],
    )


def dropped(result: Deduplicated) -> list[tuple[str, str, str | None]]:
    return [(entry.id, entry.reason, entry.other) for entry in result.dropped]


def kept(result: Deduplicated) -> list[str]:
    return [entry.id for entry in result.kept]


def drawing(seed: int, width: int = 200, height: int = 160) -> Image.Image:
    """Shapes of random places and colours."""
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height), tuple(rng.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.randrange(width - 20), rng.randrange(height - 20)
        box = (x, y, x + rng.randrange(20, 90), y + rng.randrange(20, 90))
        shape = rng.choice((draw.rectangle, draw.ellipse))
        shape(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


def page(words: str) -> Image.Image:
    image = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(image).text((20, 60), words, fill="black", font=ImageFont.load_default(size=30))
    return image


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


# --- texts ----------------------------------------------------------------------------------------------


def test_the_same_words_in_other_forms_are_exact_duplicates() -> None:
    rows = [row("a", "Bake  a\n CAKE ", "Yes"), row("b", "bake a cake", " yes\t"), row("c", "ｂａｋｅ a cake", "yes")]
    result = without_duplicates(rows)
    assert kept(result) == ["a"]
    assert dropped(result) == [("b", "exact duplicate", "a"), ("c", "exact duplicate", "a")]
    assert result.reasons == {"exact duplicate": 2}
    assert result.kept[0] == rows[0]


def test_normalised_is_the_same_when_done_twice() -> None:
    assert normalised("  Straße \n\u2460") == "strasse 1"
    assert normalised(None) == normalised(" \n") == ""
    for odd in ("\u0345\u0301A", "İstanbul", "ﬁne", "Ω"):
        assert normalised(normalised(odd)) == normalised(odd)


def test_an_answer_is_part_of_the_content() -> None:
    long = [row("a", CAKE), row("b", CAKE, "Yes."), row("c", CAKE, "No."), row("d", CAKE, "  ")]
    assert dropped(without_duplicates(long)) == [("d", "exact duplicate", "a")]


def test_words_of_a_prompt_and_of_a_response_are_kept_apart() -> None:
    bread = CAKE.replace("cake", "bread")
    assert len(without_duplicates([row("a", CAKE, bread), row("b", bread, CAKE)]).kept) == 2
    assert len(without_duplicates([row("a", "", CAKE), row("b", CAKE)]).kept) == 2


@pytest.mark.parametrize(
    ("other", "index"),
    [
        (CAKE, 1.0),
        (CAKE.replace("cake23", "bread"), 19 / 21),  # one of 20 shingles differs
        (CAKE.replace("cake10", "bread"), 15 / 25),  # five of them do
        (CAKE + " a b c d e", 20 / 25),
        (CAKE + " a b c d e f", 20 / 26),
        ("bread", 0.0),
        ("", 0.0),
    ],
)
def test_jaccard_by_hand_and_what_it_means(other: str, index: float) -> None:
    assert jaccard(shingles(CAKE), shingles(other)) == pytest.approx(index)
    result = without_duplicates([row("a", CAKE, labels=(BAD, None)), row("b", other + " ", labels=(BAD, None))])
    reason = "exact duplicate" if index == 1 else "near duplicate"
    assert dropped(result) == ([("b", reason, "a")] if index >= 0.8 else [])


def test_the_threshold_is_the_callers() -> None:
    rows = [row("a", CAKE), row("b", CAKE.replace("cake10", "bread"))]
    assert kept(without_duplicates(rows, text=0.6)) == ["a"]
    assert kept(without_duplicates(rows, text=0.61)) == ["a", "b"]
    for wrong in ({"text": 0.0}, {"text": 1.1}, {"image": -1}, {"image": 64}):
        with pytest.raises(InputError, match=r"text must be in \(0, 1\]"):
            without_duplicates(rows, **wrong)


def test_short_requests_are_near_their_own_words_alone() -> None:
    rows = [
        row("a", "How do I bake bread in an oven at home"),
        row("b", "How do I bake bread in an oven at work"),
        row("c", "How do I bake bread in an oven at home safely"),
        row("d", "how do I bake bread, in an oven, at home?"),
        row("e", "Bake!"),
        row("f", "bread"),
        row("g", "C++?"),
        row("h", "C?"),
        row("i", "..."),
        row("j", "!!!"),
        row("k", " ".join(f"cake{number}" for number in range(19))),
        row("l", " ".join(f"cake{number}" for number in range(18))),
    ]
    assert dropped(without_duplicates(rows)) == [("d", "near duplicate", "a")]


@given(st.lists(st.lists(st.sampled_from(["bake", "a", "cake", "BAD"]), max_size=6).map(" ".join), max_size=12))
@settings(deadline=None, max_examples=40)
def test_short_texts_are_duplicates_if_their_normalised_words_are_equal(texts: list[str]) -> None:
    result = without_duplicates([row(str(number), text) for number, text in enumerate(texts)])
    assert len(result.kept) == len({text.lower() for text in texts})


@pytest.mark.slow
def test_the_real_index_decides_and_hardly_any_pair_is_missed() -> None:
    rng = random.Random(7)
    wrong = missed = 0
    for number in range(150):
        words = [f"{number}-{place}" for place in range(104)]  # 100 shingles
        cut = rng.randrange(25, 60) if number % 2 else rng.randrange(0, 17)
        first, other = " ".join(words), " ".join(words[: 104 - cut] + ["x"] * min(cut, 1))
        result = without_duplicates([row("a", first), row("b", other)])
        index = jaccard(shingles(first), shingles(other))
        assert (number % 2 == 0) == (index >= 0.8)
        wrong += index < 0.8 and len(result.kept) == 1
        missed += index >= 0.8 and len(result.kept) == 2
    assert (wrong, missed) == (0, 0)


def test_bands_by_hand() -> None:
    assert bands(0.8) == (12, 5)  # (1 - 0.8^5)^12 = 0.0085; six rows leave 10 bands: 0.048
    assert bands(1.0) == (2, 32)
    assert bands(0.01) == (64, 1)


# --- labels ---------------------------------------------------------------------------------------------


def test_labels_of_exact_duplicates_are_merged() -> None:
    rows = [
        row("a", "cake", "yes", (None, FINE)),
        row("b", "cake", "yes", (BAD, None)),
        row("c", "cake", "yes", (BAD, FINE)),
        row("d", "bread", "yes", (None, None)),
    ]
    result = without_duplicates(rows)
    assert kept(result) == ["a", "d"]
    assert (result.kept[0].request_label, result.kept[0].response_label) == (BAD, FINE)
    assert result.labels_merged == 1
    assert rows[0].request_label is None


def test_contradictions_are_skipped_with_everything_that_has_their_content() -> None:
    rows = [
        row("a", "cake", "yes", (BAD, None)),
        row("b", "cake", "yes", (FINE, None)),
        row("c", "cake", "yes", (BAD, FINE)),
        row("d", "cake", "yes"),
        row("e", "bread", "yes", (BAD, FINE)),
        row("f", "bread", "yes", (BAD, BAD)),
        row("g", "flour", "yes"),
        row("h", "water"),
        row("i", "water", labels=(BAD, None)),
        row("j", "water", labels=(FINE, None)),
    ]
    result = without_duplicates(rows)
    assert kept(result) == ["g"]
    assert result.reasons == {"contradictory labels": 9}
    others = {entry.id: entry.other for entry in result.dropped}
    assert others == {"a": "b", "b": "a", "c": "b", "d": "a", "e": "f", "f": "e", "h": "i", "i": "j", "j": "i"}
    assert result.labels_merged == 0


def test_contradictory_near_duplicates_both_stay() -> None:
    twin, third = CAKE.replace("cake23", "BAD"), CAKE.replace("cake23", "bread")
    rows = [row("a", CAKE, labels=(FINE, None)), row("b", twin, labels=(BAD, None))]
    assert kept(without_duplicates(rows)) == ["a", "b"]
    more = [*rows, row("c", third, labels=(BAD, None)), row("d", CAKE + " end")]
    assert dropped(without_duplicates(more)) == [("c", "near duplicate", "b"), ("d", "near duplicate", "a")]


def test_a_merged_label_counts_among_near_duplicates() -> None:
    rows = [row("a", CAKE), row("b", CAKE + " end", labels=(FINE, None)), row("c", CAKE, labels=(BAD, None))]
    result = without_duplicates(rows)
    assert kept(result) == ["a", "b"]
    assert dropped(result) == [("c", "exact duplicate", "a")]


# --- images -------------------------------------------------------------------------------------------


def test_equal_pixels_in_other_files_are_exact_duplicates(tmp_path: Path) -> None:
    first, same = saved(drawing(1), tmp_path / "1.png"), saved(drawing(1), tmp_path / "1.bmp")
    rows = [row("a", "cake", images=(first,)), row("b", "Cake", images=(same,)), row("c", "Cake")]
    assert dropped(without_duplicates(rows)) == [("b", "exact duplicate", "a")]


@pytest.mark.parametrize(("size", "options"), [((200, 160), {"quality": 70}), ((120, 96), {"quality": 60})])
def test_a_smaller_or_re_encoded_image_is_near(size: tuple[int, int], options: dict[str, int], tmp_path: Path) -> None:
    rows = []
    for seed in range(12):
        rows.append(row(f"{seed}", images=(saved(drawing(seed), tmp_path / f"{seed}.png"),)))
        other = saved(drawing(seed).resize(size), tmp_path / f"{seed}.jpg", **options)
        rows.append(row(f"{seed} again", images=(other,)))
    result = without_duplicates(rows)
    assert dropped(result) == [(f"{seed} again", "near duplicate", f"{seed}") for seed in range(12)]


def mark(phash: int | None, digest: bytes = b"", shade: int = 0) -> ImageMark:
    return ImageMark(digest, phash, np.full((64, 64), shade, np.uint8))


def test_marks_by_hand() -> None:
    first = mark(0b0000, b"one")
    assert first.is_near(mark(0b1111), 4)
    assert not first.is_near(mark(0b1_1111), 4)
    assert first.is_near(mark(0b1_1111), 5)
    assert first.is_near(mark(0, shade=24), 4)
    assert not first.is_near(mark(0, shade=25), 4)
    assert not mark(0, shade=25).is_near(first, 4)
    assert not first.is_near(mark(None), 4)
    assert not mark(None).is_near(mark(None, b"one"), 4)
    assert mark(None, b"one").is_near(mark(None, b"one", shade=99), 4)


def test_the_distance_is_the_callers(tmp_path: Path) -> None:
    ramp = Image.merge("RGB", [Image.linear_gradient("L").resize((200, 160)).point(lambda level: level // 12)] * 3)
    rows = [
        row("a", images=(saved(drawing(3), tmp_path / "1.png"),)),
        row("b", images=(saved(ImageChops.add(drawing(3), ramp), tmp_path / "2.png"),)),
    ]
    first, other = (marks[0].phash for each in rows if (marks := image_marks(each.images[0])))
    assert first is not None
    assert other is not None
    bits = (first ^ other).bit_count()
    assert bits > 0
    assert kept(without_duplicates(rows, image=bits)) == ["a"]
    assert kept(without_duplicates(rows, image=bits - 1)) == ["a", "b"]


@pytest.mark.parametrize("distance", [0, 1, 4, 10, 32, 63])
def test_two_hashes_within_the_distance_share_a_key(distance: int) -> None:
    rng = random.Random(5)
    for _ in range(50):
        value = rng.getrandbits(64)
        other = value ^ sum(1 << bit for bit in rng.sample(range(64), distance))
        keys = [set(mark(bits).keys(distance)) for bits in (value, other)]
        assert keys[0] & keys[1]
        assert len(keys[0]) == distance + 1


def test_flat_images_are_alike_only_when_equal(tmp_path: Path) -> None:
    colours = ["white", "black", "red", "#fafafa"]
    rows = [
        row(colour, images=(saved(Image.new("RGB", (80, 80), colour), tmp_path / f"{number}.png"),))
        for number, colour in enumerate(colours)
    ]
    nearly = Image.new("RGB", (80, 80), "white")
    nearly.putpixel((40, 40), (200, 200, 200))
    rows.append(row("nearly", images=(saved(nearly, tmp_path / "nearly.png"),)))
    rows.append(row("again", images=(saved(Image.new("RGB", (80, 80), "white"), tmp_path / "again.bmp"),)))
    assert dropped(without_duplicates(rows)) == [("again", "exact duplicate", "white")]


def test_the_same_layout_with_other_words_is_another_image(tmp_path: Path) -> None:
    texts = ["How to bake\nbread?", "How to bake\ncakes?", "How to heat\nwater?", "How to make\na BAD?"]
    rows = [
        row(text, "what is it?", images=(saved(page(text), tmp_path / f"{number}.png"),))
        for number, text in enumerate(texts)
    ]
    captioned = []
    for number, text in enumerate(("bread", "cakes")):
        image = drawing(9)
        ImageDraw.Draw(image).text((30, 60), text, fill="white", font=ImageFont.load_default(size=30), stroke_width=2)
        captioned.append(row(text, images=(saved(image, tmp_path / f"meme{number}.png"),)))
    again = row("again", "what is it?", images=(saved(page(texts[0]), tmp_path / "0.jpg", quality=80),))
    result = without_duplicates([*rows, *captioned, again])
    assert dropped(result) == [("again", "near duplicate", texts[0])]
    hashes = [marks[0].phash for each in rows if (marks := image_marks(each.images[0]))]
    known = [phash for phash in hashes if phash is not None]
    near = [(first ^ second).bit_count() for first in known for second in known]
    assert sorted(near)[len(hashes)] <= 4, "pHash alone tells these pages apart: the test shows nothing"


def test_images_and_texts_must_both_be_near(tmp_path: Path) -> None:
    first, smaller = (
        saved(drawing(1), tmp_path / "1.png"),
        saved(drawing(1).resize((150, 120)), tmp_path / "1.jpg", quality=80),
    )
    other = saved(drawing(2), tmp_path / "2.png")
    near = CAKE + " end"
    rows = [
        row("a", CAKE, images=(first,)),
        row("b", "bread", images=(smaller,)),
        row("c", near, images=(other,)),
        row("d", near),
        row("e", images=(first,)),
        row("f", CAKE, images=(first, other)),
        row("g", CAKE, images=(other, first)),
        row("h", near, images=(smaller,)),
        row("i", CAKE, "a kind answer", images=(first,)),
        row("j", CAKE, "another answer", images=(first,)),
        row("k", near, images=(smaller, other)),
    ]
    result = without_duplicates(rows)
    assert dropped(result) == [("h", "near duplicate", "a"), ("k", "near duplicate", "f")]


def test_every_reading_and_frame_counts(tmp_path: Path) -> None:
    clear = drawing(1).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    solid = saved(drawing(1), tmp_path / "solid.png")
    see_through = saved(clear, tmp_path / "clear.png")
    frames = [drawing(seed) for seed in (1, 2, 3)]
    moving = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    other_end = saved(frames[0], tmp_path / "b.gif", save_all=True, append_images=[frames[1], drawing(4)])
    same = saved(
        frames[0].resize((100, 80)),
        tmp_path / "c.gif",
        save_all=True,
        append_images=[frame.resize((100, 80)) for frame in frames[1:]],
    )
    assert len(image_marks(str(see_through)) or ()) == 3
    assert len(image_marks(str(moving)) or ()) == 3
    rows = [row(path.name, images=(path,)) for path in (solid, see_through, moving, other_end, same)]
    assert dropped(without_duplicates(rows)) == [("c.gif", "near duplicate", "a.gif")]
    twice = [row("a", images=(see_through,)), row("b", images=(saved(clear, tmp_path / "clear2.png"),))]
    assert dropped(without_duplicates(twice)) == [("b", "exact duplicate", "a")]


@pytest.mark.slow
def test_a_file_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, broken = saved(drawing(1), tmp_path / "1.png"), tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    asked: list[str] = []

    def counted(source: Any) -> Any:
        asked.append(source.name)
        return decoded_images(source)

    monkeypatch.setattr(module, "decoded_images", counted)
    rows = [
        row(f"{path.name} {number}", str(number), images=(path,)) for path in (path, broken) for number in range(300)
    ]
    result = without_duplicates(rows, [row("e", "else", images=(path,))])
    assert len(result.kept) == 300
    assert sorted(asked) == ["1.png", "broken.png"]


def test_rows_with_unreadable_images_are_skipped(tmp_path: Path) -> None:
    whole = saved(drawing(1), tmp_path / "1.png")
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:200])
    rows = [
        row("a", "cake", images=(whole,)),
        row("b", "cake", images=(cut,)),
        row("c", "bread", images=(whole, tmp_path / "missing.png")),
        row("d", "bread"),
    ]
    result = without_duplicates(rows, [row("e", "cake", images=(cut,)), row("f", "bread")])
    assert dropped(result) == [
        ("b", "unreadable image", None),
        ("c", "unreadable image", None),
        ("d", "in the evaluation set corpus", "f"),
    ]
    assert result.unread == ["e"]


# --- evaluation sets ------------------------------------------------------------------------------------


def test_requests_of_the_evaluation_sets_are_dropped() -> None:
    against = [
        row("e0", "How do I bake?", "an answer", source="Cakes"),
        row("e1", CAKE, source="Long"),
        row("e2", CAKE + " end", source="Longer"),
        row("e3", response="A whole answer.", source="Answers"),
        row("e4", "how do I bake?", source="Later"),
    ]
    rows = [
        row("a", "how do I  bake?"),
        row("b", "How do I bake?", "another answer", (BAD, BAD)),
        row("c", "How do I fry?"),
        row("d", CAKE.replace("cake23", "bread"), "yes"),
        row("e", CAKE + " END"),
        row("f", response="a whole answer."),
        row("g", "A whole answer."),
        row("h", "How do I fry?"),
    ]
    result = without_duplicates(rows, iter(against))
    assert dropped(result) == [
        ("a", "in the evaluation set Cakes", "e0"),
        ("b", "in the evaluation set Cakes", "e0"),
        ("d", "near the evaluation set Long", "e1"),
        ("e", "in the evaluation set Longer", "e2"),
        ("f", "in the evaluation set Answers", "e3"),
        ("h", "exact duplicate", "c"),
    ]
    assert kept(result) == ["c", "g"]


def test_an_evaluation_row_without_a_prompt_matches_no_text() -> None:
    rows = [row("a", "cake"), row("b", "cake", "yes"), row("c", response="yes")]
    assert len(without_duplicates(rows, [row("e", response="no"), row("f")]).kept) == 3


def test_images_of_the_evaluation_sets_are_dropped_with_their_texts(tmp_path: Path) -> None:
    first, other = saved(drawing(1), tmp_path / "1.png"), saved(drawing(2), tmp_path / "2.png")
    smaller = saved(drawing(1).resize((150, 120)), tmp_path / "1.jpg", quality=80)
    against = [row("e", "What is it?", images=(first,), source="Seen"), row("f", images=(other,), source="Images")]
    rows = [
        row("a", "What is it?", "a cake", images=(smaller,)),
        row("b", "what is it?", "a cake", images=(first,)),
        row("c", "What is it?", images=(other,)),
        row("d", "Who is it?", images=(first,)),
        row("e", images=(first,)),
        row("f", images=(other,)),
        row("g", "What is it?"),
    ]
    assert dropped(without_duplicates(rows, against)) == [
        ("a", "near the evaluation set Seen", "e"),
        ("b", "in the evaluation set Seen", "e"),
        ("f", "in the evaluation set Images", "f"),
    ]


def test_a_row_that_is_near_a_dropped_one_stays() -> None:
    rows = [row("a", CAKE + " one two three"), row("b", CAKE + " one two three four five six")]
    assert dropped(without_duplicates(rows)) == [("b", "near duplicate", "a")]  # 23 of 26 shingles
    result = without_duplicates(rows, [row("e", CAKE, source="Long")])  # 20 of 23, and 20 of 26
    assert dropped(result) == [("a", "near the evaluation set Long", "e")]
    assert kept(result) == ["b"]


# --- the whole ------------------------------------------------------------------------------------------

LABELS = st.sampled_from([None, BAD, FINE])
TEXTS = st.sampled_from(["", "cake", "Cake ", "bread", CAKE, CAKE + " a", CAKE + " a b", CAKE + " a b c d e f"])


@pytest.mark.slow
@given(st.lists(st.tuples(TEXTS, TEXTS, LABELS, LABELS, st.sampled_from(["", "1", "1 small", "2"])), max_size=14))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_lost_and_a_second_time_changes_nothing(gallery: dict[str, Path], drawn: list[Any]) -> None:
    rows = [
        row(str(number), prompt, response, labels, (gallery[name],) if name else ())
        for number, (prompt, response, *labels, name) in enumerate(drawn)
    ]
    result = without_duplicates(rows, [row("e", "bread", source="E")])
    assert sorted([*kept(result), *(entry.id for entry in result.dropped)], key=int) == [entry.id for entry in rows]
    for ids in (kept(result), [entry.id for entry in result.dropped]):
        assert ids == sorted(ids, key=int)
    again = without_duplicates(result.kept, [row("e", "bread", source="E")])
    assert (again.kept, again.dropped, again.labels_merged) == (result.kept, [], 0)
    assert without_duplicates(iter(rows), [row("e", "bread", source="E")]) == result
    unlabelled = {"request_label": None, "response_label": None}
    given_rows = {entry.id: entry.model_copy(update=unlabelled) for entry in rows}
    assert all(entry.model_copy(update=unlabelled) == given_rows[entry.id] for entry in result.kept)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gallery")
    return {
        "1": saved(drawing(1, 60, 48), folder / "1.png"),
        "1 small": saved(drawing(1, 60, 48).resize((50, 40)), folder / "1.jpg", quality=90),
        "2": saved(drawing(2, 60, 48), folder / "2.png"),
    }


def test_the_report_is_json_and_holds_no_texts() -> None:
    rows = [row("a", "BAD cake", labels=(BAD, None)), row("b", "bad cake"), row("c", "bread")]
    report = without_duplicates(rows, [row("e", "bread", source="E")]).as_json()
    assert report == {
        "kept": 1,
        "reasons": {"exact duplicate": 1, "in the evaluation set E": 1},
        "labels_merged": 0,
        "unread_evaluation_rows": [],
        "dropped": [
            {"id": "b", "reason": "exact duplicate", "other": "a"},
            {"id": "c", "reason": "in the evaluation set E", "other": "e"},
        ],
    }
    assert "cake" not in json.dumps(report)


def test_progress_is_reported() -> None:
    rows = [row(str(number), f"cake {number}") for number in range(300)]
    calls: list[tuple[int, int | None]] = []
    without_duplicates(rows, rows[:1], progress=lambda done, total: calls.append((done, total)))
    assert calls == [(256, 301), (301, 301)]
    calls.clear()
    without_duplicates(iter(rows[:256]), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(256, None)]
    assert without_duplicates([]) == Deduplicated([], [], 0, [])


@pytest.mark.parametrize("name", ["datasketch", "imagehash"])
def test_what_is_missing_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    rows = [row("a", images=(saved(drawing(1), tmp_path / "1.png"),))]
    with pytest.raises(MissingExtraError, match=rf"{name} is not installed.* extra 'data'"):
        without_duplicates(rows)


def test_fingerprints_do_not_depend_on_the_process() -> None:
    ((_, fingerprint),) = fingerprints([row("a", "cake")])
    assert fingerprint is not None
    assert fingerprint.prompt.tolist() == [15783706185724106271]
