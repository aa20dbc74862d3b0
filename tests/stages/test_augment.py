"""From hard rows to the RL set: counts, images, what is skipped, and running again."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl.corpus.attempts import REASONING, Attempt
from guardreasoner_vl.corpus.check import check_corpus
from guardreasoner_vl.corpus.store import INFO, ROWS, CorpusInfo, SourceInfo, read_corpus, read_info, write_corpus
from guardreasoner_vl.errors import DataError
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.recipe import Recipe, parse_recipe
from guardreasoner_vl.sources.union import class_of
from guardreasoner_vl.stages import augment
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

RED, BLUE = (255, 0, 0), (0, 0, 255)


def recipe(seed: int = 1, **section: Any) -> Recipe:
    return parse_recipe({"name": "toy", "seed": seed, "augment": section})


def sample(name: str, **fields: Any) -> Sample:
    base = {"source": "toy", "modality": "text", "prompt": f"bread {name}?", "request_label": "unharmful"}
    return Sample.model_validate({"id": name, **base, **fields})


def written(folder: Path, rows: Iterable[Sample]) -> Path:
    source = SourceInfo(name="toy", origin="made up", licence="CC0")
    write_corpus(folder, CorpusInfo(name="mined", sources=(source,)), rows)
    return folder


def mixed(folder: Path, count: int, harmful: int = 3) -> Path:
    """Hard rows of all modalities in turn; one in `harmful` is harmful."""
    folder.mkdir(parents=True)
    rows = []
    for at in range(count):
        fields: dict[str, Any] = {"request_label": "harmful" if at % harmful == 0 else "unharmful"}
        if at % 3:
            path = folder / f"{at}.png"
            Image.new("RGB", (20 + at % 7, 30), RED if at % 2 else BLUE).save(path)
            fields |= {"images": (str(path),), "modality": "image" if at % 3 == 1 else "text-image"}
            fields |= {"prompt": ""} if at % 3 == 1 else {}
        else:
            fields |= {"response": "Mix it.", "response_label": fields["request_label"]}
        rows.append(sample(f"s{at}", **fields))
    return written(folder, rows)


def joined_rows(folder: Path) -> list[Sample]:
    return [row for row in read_corpus(folder) if row.source == "augmented"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_hard_rows_become_the_rl_set(tmp_path: Path) -> None:
    hard = mixed(tmp_path / "hard", 80)
    seen: list[tuple[int, int | None]] = []
    report = augment.run(recipe(), hard, tmp_path / "rl", progress=lambda *now: seen.append(now))
    rows = list(read_corpus(tmp_path / "rl"))
    assert rows[:80] == list(read_corpus(hard))
    joined_rows = rows[80:]
    assert (report.hard, report.wanted, report.augmented, report.missing, len(joined_rows)) == (80, 20, 20, 0, 20)
    assert seen == [(at, 20) for at in range(1, 21)]
    assert len({row.id for row in rows}) == 100
    assert len({frozenset(parent["id"] for parent in row.meta["parents"]) for row in joined_rows}) == 20
    by_id = {row.id: row for row in rows}
    for row in joined_rows:
        parents = [by_id[parent["id"]] for parent in row.meta["parents"]]
        labels = [parent.request_label for parent in parents]
        assert row.request_label == ("harmful" if "harmful" in labels else "unharmful")
        assert len(row.images) == any(parent.images for parent in parents)
        exchange, images = checked_exchange(row.exchange())
        assert build_messages(exchange)[1].text.count("<image>") == len(images) == len(row.images)
    assert report.before == {"harmful": 27, "unharmful": 53}
    assert report.after == dict(sorted(Counter(str(class_of(row)) for row in rows).items()))
    assert sum(report.kinds.values()) == 20
    assert sum(count for name, count in report.labels.items() if name.startswith("request")) == 20
    assert sum(count for name, count in report.labels.items() if name.startswith("response")) == 20
    assert "request unknown" not in report.labels
    info = read_info(tmp_path / "rl")
    assert (info.name, info.seed, info.rows) == ("toy", 1, 100)
    assert info.sources[1] == SourceInfo(name="augmented", origin="pairs of the other rows", licence="CC0")
    assert check_corpus(tmp_path / "rl")[1].rows == []


def test_every_kind_of_pair_occurs(tmp_path: Path) -> None:
    report = augment.run(recipe(share=0.6), mixed(tmp_path / "hard", 60), tmp_path / "rl")
    assert set(report.kinds) == {
        "text + text",
        "image + image",
        "text-image + text-image",
        "image + text",
        "text + text-image",
        "image + text-image",
    }
    assert {row.modality for row in joined_rows(tmp_path / "rl")} == {"text", "image", "text-image"}


def test_merged_images_lie_beside_the_rows(tmp_path: Path) -> None:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (20, 10), RED).save(red)
    Image.new("RGB", (30, 30), BLUE).save(blue)
    rows = [sample("a", images=(str(red), str(red))), sample("b", images=(str(blue),))]
    hard = written(tmp_path / "hard", rows)
    layouts = set()
    for seed in range(8):
        augment.run(recipe(seed, share=0.34), hard, tmp_path / "rl")
        (row,) = joined_rows(tmp_path / "rl")
        path = Path(row.images[0])
        assert path == tmp_path / "rl" / "images" / f"{row.id.removeprefix('aug/')}.png"
        (image,) = decoded_images(path)
        colours = {colour: count for count, colour in image.getcolors() or []}
        layouts.add(row.meta["layout"])
        if row.meta["layout"] == "side_by_side":  # two of 60 x 30 and one of 30 x 30
            assert (image.size, colours) == ((150, 30), {RED: 3600, BLUE: 900})
        else:  # two of 30 x 15 and one of 30 x 30
            assert (image.size, colours) == ((30, 60), {RED: 900, BLUE: 900})
    assert len(layouts) == 2


def test_merged_images_keep_the_recipe_s_limit(tmp_path: Path) -> None:
    """A finished set is made again if the limit has changed."""
    paths = [tmp_path / f"{name}.png" for name in ("red", "blue")]
    for path, colour in zip(paths, (RED, BLUE), strict=True):
        Image.new("RGB", (60, 40), colour).save(path)
    hard = written(tmp_path / "hard", [sample(path.stem, images=(str(path),)) for path in paths])
    areas = []
    for model in (None, {"path": "x", "max_pixels": 1000}):
        content = {"name": "toy", "seed": 1, "model": model, "augment": {"share": 0.34}}
        augment.run(parse_recipe(content), hard, tmp_path / "rl")
        (row,) = joined_rows(tmp_path / "rl")
        (image,) = decoded_images(Path(row.images[0]))
        areas.append(image.width * image.height)
    assert areas[0] == 2 * 60 * 40
    assert 900 < areas[1] <= 1000


def test_the_merged_image_contains_every_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (10, 10), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (10, 10), (0, 255, 0)).save(tmp_path / "still.png")
    rows = [sample("a", images=(str(tmp_path / "moving.gif"),)), sample("b", images=(str(tmp_path / "still.png"),))]
    augment.run(recipe(share=0.34), written(tmp_path / "hard", rows), tmp_path / "rl")
    (image,) = decoded_images(Path(joined_rows(tmp_path / "rl")[0].images[0]))
    assert sorted(image.size) == [10, 30]
    assert {colour for _, colour in image.getcolors() or []} == {RED, BLUE, (0, 255, 0)}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    hard = mixed(tmp_path / "hard", 30)
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        augment.run(recipe(seed), hard, tmp_path / name)
    first, again, other = (contents(tmp_path / name) for name in ("one", "again", "other"))
    assert first == again
    assert set(first) > {"augment.json", "contact_sheet.html", "contact_sheet.png", "corpus.json", "rows.parquet"}
    assert first["rows.parquet"] != other["rows.parquet"]


# --- balance --------------------------------------------------------------------------------------------


def test_balanced_pairs_are_harmful_and_unharmful_alike(tmp_path: Path) -> None:
    hard = mixed(tmp_path / "hard", 60, harmful=2)
    report = augment.run(recipe(share=0.4), hard, tmp_path / "rl")
    assert report.after["harmful"] - report.before["harmful"] >= 24  # of 40; 30 are to be expected
    even = augment.run(recipe(share=0.4, balanced=True), hard, tmp_path / "even")
    assert (even.wanted, even.augmented) == (40, 40)
    assert Counter(class_of(row) for row in joined_rows(tmp_path / "even")) == {"harmful": 20, "unharmful": 20}


def test_balance_ends_where_one_kind_runs_out(tmp_path: Path) -> None:
    harmful = [sample(f"h{at}", request_label="harmful") for at in range(7)]
    hard = written(tmp_path / "hard", [*harmful, *(sample(f"u{at}") for at in range(3))])
    report = augment.run(recipe(share=0.5, balanced=True), hard, tmp_path / "rl")
    # Three pairs without a harmful row are all there are.
    assert (report.wanted, report.augmented, report.missing) == (10, 6, 4)
    assert Counter(class_of(row) for row in joined_rows(tmp_path / "rl")) == {"harmful": 3, "unharmful": 3}


# --- what cannot be used --------------------------------------------------------------------------------


def test_small_sets_run_out_of_pairs(tmp_path: Path) -> None:
    hard = written(tmp_path / "hard", [sample(name) for name in "abc"])
    report = augment.run(recipe(share=0.75), hard, tmp_path / "rl")
    assert (report.wanted, report.augmented, report.missing) == (9, 3, 6)
    assert json.loads((tmp_path / "rl" / augment.REPORT).read_text())["augmented"] == 3


def test_unreadable_images_are_counted_and_other_pairs_drawn(tmp_path: Path) -> None:
    broken, gone, fine = (tmp_path / f"{name}.png" for name in ("broken", "gone", "fine"))
    broken.write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(fine)
    rows = [
        sample("a", images=(str(broken),)),
        sample("b", images=(str(gone),)),
        sample("c", images=(str(fine),)),
        sample("d"),
        sample("e"),
    ]
    report = augment.run(recipe(share=0.6), written(tmp_path / "hard", rows), tmp_path / "rl")
    # Of the ten pairs three are left: c, d and e among themselves.
    assert (report.wanted, report.augmented) == (8, 3)
    assert report.skipped == {augment.UNREADABLE: 7}
    parents = {parent["id"] for row in joined_rows(tmp_path / "rl") for parent in row.meta["parents"]}
    assert parents == {"c", "d", "e"}


def test_pairs_without_a_known_label_are_counted(tmp_path: Path) -> None:
    asked = {"response": "Mix it.", "response_label": None}
    answered = {"response": "Mix it.", "response_label": "unharmful", "request_label": None}
    rows = [sample("a", **asked), sample("b", **asked), sample("c", **answered)]
    report = augment.run(recipe(share=0.5), written(tmp_path / "hard", rows), tmp_path / "rl")
    assert (report.augmented, report.skipped) == (1, {augment.UNLABELLED: 2})
    assert report.labels == {"request unharmful": 1, "response unknown": 1}


def test_thin_images_are_counted(tmp_path: Path) -> None:
    rows = []
    for name, size in (("wide", (2000, 10)), ("tall", (10, 2000))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
        rows.append(sample(name, images=(str(tmp_path / f"{name}.png"),)))
    report = augment.run(recipe(share=0.34), written(tmp_path / "hard", rows), tmp_path / "rl")
    assert (report.augmented, report.skipped) == (0, {augment.THIN: 1})


def test_only_rows_to_train_on_are_joined(tmp_path: Path) -> None:
    rows = [sample("a"), sample("b"), *(sample(f"v{at}", split="validation") for at in range(8))]
    report = augment.run(recipe(share=0.4), written(tmp_path / "hard", rows), tmp_path / "rl")
    assert (report.hard, report.wanted, report.augmented) == (2, 1, 1)
    assert Counter(row.split for row in read_corpus(tmp_path / "rl")) == {"train": 3, "validation": 8}
    assert {parent["id"] for parent in joined_rows(tmp_path / "rl")[0].meta["parents"]} == {"a", "b"}


def test_the_draw_gives_up_in_time(tmp_path: Path) -> None:
    rows = [sample(f"s{at}", request_label=None) for at in range(60)]
    report = augment.run(recipe(share=0.02), written(tmp_path / "hard", rows), tmp_path / "rl")
    assert (report.wanted, report.augmented) == (1, 0)
    assert report.skipped == {augment.UNLABELLED: 100}  # and not all of the 1,770 pairs


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no hard row to train on; mine more"),
        ([sample("v", split="validation")], "no hard row to train on; mine more"),
        ([sample("a")], "one row makes no pair; .*augment.share to 0"),
    ],
)
def test_too_few_rows_are_refused(rows: list[Sample], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        augment.run(recipe(), written(tmp_path / "hard", rows), tmp_path / "rl")
    assert not (tmp_path / "rl").exists()


def test_without_a_share_the_rows_are_passed_on(tmp_path: Path) -> None:
    report = augment.run(recipe(share=0), written(tmp_path / "hard", [sample("a")]), tmp_path / "rl")
    assert (report.hard, report.wanted, report.augmented) == (1, 0, 0)
    assert [row.id for row in read_corpus(tmp_path / "rl")] == ["a"]
    assert [source.name for source in read_info(tmp_path / "rl").sources] == ["toy"]


# --- running again --------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_set_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hard = mixed(tmp_path / "hard", 12)
    report = augment.run(recipe(), hard, tmp_path / "rl")
    before = stamps(tmp_path / "rl")
    monkeypatch.chdir(tmp_path)
    assert augment.run(recipe(), Path("hard"), tmp_path / "rl") == report  # the rows count, not how they are named
    assert stamps(tmp_path / "rl") == before


def test_what_it_is_made_from_decides(tmp_path: Path) -> None:
    hard = mixed(tmp_path / "hard", 12)
    augment.run(recipe(), hard, tmp_path / "rl")
    first_rows = contents(tmp_path / "rl")[ROWS]
    augment.run(recipe(seed=2), hard, tmp_path / "rl")
    other = contents(tmp_path / "rl")[ROWS]
    assert first_rows != other
    assert augment.run(recipe(seed=2, share=0.5), hard, tmp_path / "rl").augmented == 12
    augment.run(recipe(), hard, tmp_path / "rl")
    assert contents(tmp_path / "rl")[ROWS] == first_rows
    later = Attempt(id="s0", reasoning="## Reasoning Step 1\nIt is bread.", teacher="t")
    (hard / REASONING).write_text(later.model_dump_json() + "\n")
    augment.run(recipe(), hard, tmp_path / "rl")
    assert next(iter(read_corpus(tmp_path / "rl"))).reasoning == later.reasoning


@pytest.mark.slow
def test_a_kill_leaves_nothing_that_counts_as_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hard, out = mixed(tmp_path / "hard", 30), tmp_path / "rl"
    augment.run(recipe(), hard, tmp_path / "whole")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("merge_images", "write_sheet", "write_json", "write_corpus"):
        augment.run(recipe(seed=5), hard, out)  # an older set stands there
        with monkeypatch.context() as patch:
            patch.setattr(augment, name, killed)
            with pytest.raises(KeyboardInterrupt):
                augment.run(recipe(), hard, out)
        assert not (out / INFO).exists(), name
        augment.run(recipe(), hard, out)
        assert contents(out)[ROWS] == contents(tmp_path / "whole")[ROWS]


@pytest.mark.parametrize("torn", ["", "[]", "{}", '{"made from": 1}'])
def test_a_torn_report_is_written_again(torn: str, tmp_path: Path) -> None:
    hard = written(tmp_path / "hard", [sample(name) for name in "abcd"])
    report = augment.run(recipe(), hard, tmp_path / "rl")
    (tmp_path / "rl" / augment.REPORT).write_text(torn)
    assert augment.run(recipe(), hard, tmp_path / "rl") == report
    assert json.loads((tmp_path / "rl" / augment.REPORT).read_text())["hard"] == 4


def test_other_corpora_are_left_alone(tmp_path: Path) -> None:
    hard = written(tmp_path / "hard", [sample("a"), sample("b")])
    before = contents(hard)
    with pytest.raises(DataError, match="a corpus that `augment` did not make"):
        augment.run(recipe(), hard, hard)
    assert contents(hard) == before
    augment.run(recipe(share=0.34), hard, tmp_path / "rl")
    with pytest.raises(DataError, match="augmented already"):
        augment.run(recipe(), tmp_path / "rl", tmp_path / "twice")
    with pytest.raises(DataError, match="curate --out"):
        augment.run(recipe(), tmp_path / "nothing", tmp_path / "rl")


# --- the contact sheet ----------------------------------------------------------------------------------


def test_the_sheet_shows_a_few_rows_and_no_long_texts(tmp_path: Path) -> None:
    hard = mixed(tmp_path / "hard", 60)
    said = "a very long <b>recipe</b> that nobody reads to its end, and that has more to it"
    rows = [row.model_copy(update={"prompt": said}) if row.prompt else row for row in read_corpus(hard)]
    report = augment.run(recipe(share=0.5), written(tmp_path / "long", rows), tmp_path / "rl")
    page = (tmp_path / "rl" / "contact_sheet.html").read_text()
    assert "a very long &lt;b&gt;recipe&lt;/b&gt; that nobody re</td>" in page  # 40 characters
    assert "reads" not in page
    assert page.count("<tr>") == 1 + 12
    assert "may hold harmful content: keep this page" in page
    cells = [line.partition("</td><td>")[2].partition("</td>")[0] for line in page.split("<tr>")[2:]]
    kinds = Counter(" + ".join(sorted(kind.partition(",")[0].split(" + "))) for kind in cells)
    assert kinds == dict.fromkeys(report.kinds, 2)  # six kinds by turns
    (sheet,) = decoded_images(tmp_path / "rl" / "contact_sheet.png")
    assert sheet.size == (4 * 260, 3 * 276)
    assert {RED, BLUE} <= {colour for _, colour in sheet.getcolors(1 << 20) or []}
