"""From a recipe's sources to a corpus: every row is kept or skipped with its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

from guardreasoner_vl.corpus.store import SKIPPED, read_corpus, read_info
from guardreasoner_vl.errors import DataError, InputError, RecipeError
from guardreasoner_vl.protocol import INSTRUCTION
from guardreasoner_vl.recipe import Recipe, load_recipe, parse_recipe
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.stages import curate, synthesize
from guardreasoner_vl.teachers.offline import RulesTeacher
from tests.builders import answer, write_records, write_rows
from tests.smoke import PATH

if TYPE_CHECKING:
    from guardreasoner_vl.types import Sample

TOY = {"folder": "toy", "origin": "made up", "licence": "CC0"}
SUBJECTS = ("bread", "cake", "soup", "tea", "jam", "rice", "pie", "stew")


def recipe(*sources: dict[str, Any], **data: Any) -> Recipe:
    return parse_recipe({"name": "toy", "seed": 1, "data": {"sources": list(sources) or [TOY], **data}})


def toy_rows(count: int) -> list[dict[str, Any]]:
    """Short requests, no two alike, none held out."""
    names = (f"toy-{number}" for number in range(10 * count))
    kept = [name for name in names if not is_held_out(name)][:count]
    return [
        {
            "id": name,
            "prompt": f"{SUBJECTS[at % 8]} number {at} of the {SUBJECTS[at // 8 % 8]}",
            "request_label": "harmful" if at % 4 == 0 else "unharmful",
            "meta": {"category": "Suicide and Self Harm"} if at % 4 == 0 else {},
        }
        for at, name in enumerate(kept)
    ]


def curated(
    data: Path, out: Path, settings: Recipe | None = None, **options: Any
) -> tuple[list[Sample], dict[str, str]]:
    """The corpus's rows, and the reasons of those skipped."""
    curate.run(settings or recipe(), data, out, **options)
    lines = (out / SKIPPED).read_text().splitlines()
    return list(read_corpus(out)), {row["id"]: row["reason"] for row in map(json.loads, lines)}


def test_a_recipe_becomes_a_corpus(tmp_path: Path) -> None:
    held_out = next(f"h{number}" for number in range(1000) if is_held_out(f"h{number}"))
    extra = {"id": held_out, "prompt": "a held-out row", "request_label": "unharmful"}
    write_rows(tmp_path / "data" / "toy" / "train.jsonl", [*toy_rows(40), extra])
    rows, skipped = curated(tmp_path / "data", tmp_path / "out")
    assert Counter(row.split for row in rows) == {"train": 40, "validation": 1}
    assert rows[-1].id == held_out
    assert skipped == {}
    assert rows[0].meta["taxonomy"] == "self-harm"
    info = read_info(tmp_path / "out")
    assert (info.name, info.rows, info.sources[0].licence) == ("toy", 41, "CC0")
    report = json.loads((tmp_path / "out" / curate.REPORT).read_text())
    assert (report["read"], report["kept"], report["skipped"]) == (41, 41, {})


def test_the_released_corpus_is_kept_as_published_and_needs_no_teacher(tmp_path: Path) -> None:
    think = "# Task 1\n## Reasoning Step 1\nThe user asks about bread."
    said = [
        ("system", INSTRUCTION),
        ("user", "Human user:\nHow do I bake bread?\n\nAI assistant:\nNone\n"),
        ("assistant", answer(reasoning=think)),
    ]
    record = {"messages": [{"role": role, "content": text} for role, text in said]}
    write_records(tmp_path / "data" / "guardreasoner-vltrain", "GuardReasoner-VLTrainText.json", [record] * 40)
    rows, skipped = curated(tmp_path / "data", tmp_path / "out", load_recipe(PATH.parent / "3b-released.yaml"))
    assert {(row.prompt, row.request_label, row.reasoning) for row in rows} == {
        ("How do I bake bread?", "unharmful", think)
    }
    assert (len(rows), skipped) == (40, {})
    report = synthesize.run(tmp_path / "out", RulesTeacher())
    assert (report.kept, report.asked, report.remaining) == (40, 0, 0)


def test_bad_rows_are_skipped_with_their_reasons(tmp_path: Path) -> None:
    good = toy_rows(6)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    rows = [
        *good,
        {"id": "none", "prompt": "no label at all"},
        {"id": good[0]["id"], "prompt": "its id again", "request_label": "harmful"},
        {"id": "twice", "prompt": good[1]["prompt"].upper(), "request_label": good[1]["request_label"]},
        {"id": "yes", "prompt": "is this one fine", "request_label": "harmful"},
        {"id": "no", "prompt": "is this one fine", "request_label": "unharmful"},
        {"id": "torn", "prompt": "", "images": ["broken.png"], "modality": "image", "request_label": "harmful"},
    ]
    path = write_rows(tmp_path / "data" / "toy" / "train.jsonl", rows)
    with path.open("a") as stream:
        stream.write("broken\n")
    (path.parent / "broken.png").write_bytes(b"no image")
    kept, skipped = curated(tmp_path / "data", tmp_path / "out", recipe(duplicates={}))
    assert [row.id for row in kept] == [row["id"] for row in good]
    assert skipped == {
        "train.jsonl, line 13": "not JSON",
        "none": "no label",
        good[0]["id"]: "repeated id",
        "twice": "exact duplicate",
        "yes": "contradictory labels",
        "no": "contradictory labels",
        "torn": "unreadable image",
    }
    report = json.loads((tmp_path / "out" / curate.REPORT).read_text())
    assert report["read"] == len(rows) + 1 == report["kept"] + sum(report["skipped"].values())


def test_rows_of_the_evaluation_sets_are_dropped(tmp_path: Path) -> None:
    rows = toy_rows(10)
    write_rows(tmp_path / "data" / "toy" / "train.jsonl", rows)
    taken = [{**rows[at], "id": f"test-{at}"} for at in (2, 5)]
    write_rows(tmp_path / "data" / "mine" / "test.jsonl", taken)
    settings = recipe(duplicates={"against": ["mine/test.jsonl"]})
    kept, skipped = curated(tmp_path / "data", tmp_path / "out", settings)
    assert len(kept) == 8
    assert skipped == {rows[2]["id"]: "in the evaluation set toy", rows[5]["id"]: "in the evaluation set toy"}


def test_shares_limits_and_balance(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "toy" / "train.jsonl", toy_rows(80))
    half, _ = curated(tmp_path / "data", tmp_path / "half", recipe({**TOY, "share": 0.5}))
    assert 25 <= len(half) <= 55
    again, _ = curated(tmp_path / "data", tmp_path / "again", recipe({**TOY, "share": 0.5}))
    assert half == again
    tested, _ = curated(tmp_path / "data", tmp_path / "tested", recipe({**TOY, "test_share": 0.2}))
    assert Counter(row.split for row in tested)["test"] in range(8, 26)
    assert len(tested) == 80
    even, _ = curated(tmp_path / "data", tmp_path / "even", recipe(balance={"harmful": 0.5}))
    assert Counter(row.request_label for row in even) == {"harmful": 20, "unharmful": 20}
    twice, _ = curated(tmp_path / "data", tmp_path / "twice", recipe({**TOY, "repeat": 2}))
    assert (len(twice), twice[0].meta["repeat"]) == (80, 2)


def test_public_sources_in_their_own_layout(tmp_path: Path) -> None:
    drawn = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(drawn).ellipse((8, 8, 50, 40), fill="green")
    drawn.save(tmp_path / "tea.png")
    image = {"bytes": (tmp_path / "tea.png").read_bytes(), "path": None}
    pair = {
        "image": image,
        "question": "What is this?",
        "chosen": "A plate of green tea.",
        "rejected": "A BAD thing.",
    }
    write_records(tmp_path / "data" / "spa", "data/train-00000-of-00001.parquet", [{**pair, "class1": "Malicious Use"}])
    released = {
        "messages": [
            {"role": "system", "content": "judge"},
            {"role": "user", "content": "Human user:\n<image>\nWhat is this?\n\nAI assistant:\nA BAD thing.\n"},
            {
                "role": "assistant",
                "content": "<think>\n## Reasoning Step 1\nBad.\n</think>\n<result>\nAnswers:\nRequest: unharmful\n"
                "Response: harmful\n</result>",
            },
        ],
        "images": ["tea.png"],
    }
    write_records(tmp_path / "data" / "released", "TextImage.json", [released])
    drawn.save(tmp_path / "data" / "released" / "tea.png")
    source = {"folder": "spa", "adapter": "spa-vl", "unlabelled": True, "labels_from": "released"}
    rows, _ = curated(tmp_path / "data", tmp_path / "out", recipe(source))
    labels = {row.response: (row.request_label, row.response_label) for row in rows}
    assert labels == {"A plate of green tea.": (None, None), "A BAD thing.": ("unharmful", "harmful")}
    assert {row.source for row in rows} == {"spa-vl"}
    assert read_info(tmp_path / "out").sources[0].licence == "CC-BY-4.0"
    (tmp_path / "data").rename(tmp_path / "gone")  # images were unpacked, and are the corpus's own
    assert all(Path(row.images[0]).is_relative_to(tmp_path / "out") for row in rows)
    embedded = curate.run(recipe(source), tmp_path / "gone", tmp_path / "embedded", embed=True)
    assert embedded.info.rows == 2


def test_what_cannot_be_curated_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "toy" / "train.jsonl", toy_rows(4))
    for source, message in (
        (
            {"folder": "none", "adapter": "wildguardtrain"},
            "no train/wildguard_train.parquet.*get it from .*wildguardmix",
        ),
        ({"folder": "hub:allenai/wildguardmix", "adapter": "wildguardtrain"}, "no revision; give .*@REVISION"),
        ({**TOY, "folder": "nowhere"}, r"no train\.jsonl"),
    ):
        with pytest.raises(DataError, match=message):
            curate.run(recipe(source), tmp_path / "data", tmp_path / f"out-{source['folder'][:4]}")
    with pytest.raises(InputError, match="no data set named 'nonsense'"):
        curate.run(recipe({"folder": "toy", "adapter": "nonsense"}), tmp_path / "data", tmp_path / "odd")
    with pytest.raises(RecipeError, match="another recipe"):
        curate.run(recipe(), tmp_path / "data", tmp_path / "odd")
    with pytest.raises(RecipeError, match="origin and licence"):
        recipe({"folder": "toy"})
    with pytest.raises(RecipeError, match="shares of the corpus"):
        recipe(balance={"modalities": {"text": 0.5, "image": 0.4}})


def test_rows_are_joined_and_varied_after_the_evaluation_sets_are_out(tmp_path: Path) -> None:
    rows = toy_rows(60)
    write_rows(tmp_path / "data" / "toy" / "train.jsonl", rows)
    write_rows(tmp_path / "data" / "mine" / "test.jsonl", [{**rows[at], "id": f"test-{at}"} for at in range(20)])
    asked = {"joined": {"share": 0.5}, "varied": {"share": 0.5}, "duplicates": {"against": ["mine/test.jsonl"]}}
    kept, skipped = curated(tmp_path / "data", tmp_path / "out", recipe({**TOY, "repeat": 2}, **asked))
    assert len(skipped) == 20
    joined_rows = [row for row in kept if row.source == "joined"]
    assert {name for row in joined_rows for name in row.meta["of"]} <= {row["id"] for row in rows[20:]}
    assert len({row.id for row in kept}) == len(kept)
    assert sum(row.meta.get("repeat", 1) for row in kept) == 160
    assert len(joined_rows) == 80  # as many as the rows that are taken twice each
    assert any("variation" in row.meta for row in joined_rows)
    source = read_info(tmp_path / "out").sources[-1]
    assert (source.name, source.licence) == ("joined", "CC0")
    report = json.loads((tmp_path / "out" / curate.REPORT).read_text())
    assert report["read"] + report["made"] == report["kept"] + sum(report["skipped"].values())
    again, _ = curated(tmp_path / "data", tmp_path / "again", recipe({**TOY, "repeat": 2}, **asked))
    assert again == kept
