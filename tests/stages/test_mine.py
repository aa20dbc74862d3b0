"""Hard-sample mining: what is asked, what counts as right, which rows are kept, and that nothing is asked twice."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.corpus.attempts import REASONING, Attempt
from guardreasoner_vl.corpus.progress import REPEATED
from guardreasoner_vl.corpus.store import INFO, ROWS, SKIPPED, CorpusInfo, SourceInfo, read_corpus, read_info
from guardreasoner_vl.corpus.store import write_corpus as put_corpus
from guardreasoner_vl.engines import faults
from guardreasoner_vl.engines.base import EngineResult
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import DataError, EngineError, InputError, InputTooLongError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.mining import report as mine_report
from guardreasoner_vl.mining.candidates import candidate_seed, is_kept, read_candidates
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.recipe import Recipe, parse_recipe
from guardreasoner_vl.stages import mine
from guardreasoner_vl.types import ModelInfo, Sample, Usage
from tests.builders import answer
from tests.made_images import image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import Engine, EngineRequest
    from guardreasoner_vl.mining.report import MiningReport
    from guardreasoner_vl.recipe import KeepRule

pytestmark = pytest.mark.slow
SOURCES = (SourceInfo(name="toy", origin="made up", licence="CC0"),)


def recipe(seed: int = 1, **section: Any) -> Recipe:
    return parse_recipe({"name": "hard", "seed": seed, "mine": {"max_new_tokens": 64, **section}})


def row(name: str, plan: str = "WWWW", **fields: Any) -> Sample:
    """An unharmful row whose prompt says its name and what its candidates are to be (see `says`)."""
    content = {"prompt": f"cake [{name}:{plan}]", "request_label": "unharmful", "modality": "text", "source": "toy"}
    return Sample.model_validate({"id": name, **content, **fields})


def corpus(folder: Path, *rows: Sample, embed: bool = False) -> Path:
    put_corpus(folder, CorpusInfo(name="toy", seed=9, sources=SOURCES), rows, embed=embed)
    return folder


def says(letter: str) -> EngineResult:
    """The answer that a letter of a plan stands for, about an unharmful row."""
    stop = {
        "R": answer("unharmful"),
        "W": answer("harmful"),
        "X": answer("unharmful", "harmful"),
        "U": "I would say unharmful.",
    }
    if letter == "T":
        return EngineResult(answer("unharmful"), "length", usage=Usage(completion_tokens=64))
    if letter == "E":
        raise EngineError("out of order; try again")
    if letter == "L":
        raise InputTooLongError("too long; shorten it")
    return EngineResult(stop[letter], "stop", usage=Usage(completion_tokens=10))


class Planned(ScriptedEngine):
    """Follows the plans in the prompts; `calls` are the sizes of what it was asked at once, `asked` the rows."""

    def __init__(self, then: Callable[[str, int], EngineResult] | None = None) -> None:
        self.calls: list[int] = []
        self.asked: Counter[str] = Counter()
        self.stop_at: int | None = None
        self._then = then
        super().__init__(self._said)

    def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
        if len(self.calls) == self.stop_at:
            raise RuntimeError("killed")
        self.calls.append(len(requests))
        return super().generate(requests)

    def _said(self, request: EngineRequest) -> EngineResult:
        name, _, plan = request.messages[-1].text.partition("[")[2].partition("]")[0].partition(":")
        number = self.asked[name]
        self.asked[name] += 1
        return self._then(name, number) if self._then else says(plan[number % len(plan)])


class Renamed(Planned):
    @property
    def model(self) -> ModelInfo:
        return ModelInfo(name="scripted", revision="2")


def mined(settings: Recipe, data: Path, engine: Engine, out: Path, **options: Any) -> MiningReport:
    return mine.run(settings, data, Guard(engine), out, **options)


def lines(out: Path, name: str = mine.CANDIDATES) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def ids(folder: Path) -> list[str]:
    return [sample.id for sample in read_corpus(folder)]


def report_in(out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((out / mine_report.REPORT).read_text())
    return report


PLANS = [
    row("a", "WWWW"),
    row("b", "RRRR"),
    row("c", "RWWR", source="other"),
    row("d", "UTWU"),
    row("e", "XXXX", source="other"),
    row("f", "RRRR", response="Flour.", request_label=None, response_label="harmful"),
]
"""By hand: three answers to d and the four to f, which lack the response's label, are outside the grammar. W is half
right: None is the right word about a response that is not there."""


# --- what is right, and what is kept --------------------------------------------------------------------


def test_rows_with_wrong_answers_alone_are_kept(tmp_path: Path) -> None:
    report = mined(recipe(), corpus(tmp_path / "toy", *PLANS), Planned(), tmp_path / "out")
    assert lines(tmp_path / "out") == [
        {
            "id": name,
            "source": source,
            "modality": "text",
            "right": right,
            "safety": safety,
            "tokens": tokens,
            "reasons": reasons,
        }
        for name, source, right, safety, tokens, reasons in [
            ("a", "toy", [False] * 4, [0.5] * 4, [10] * 4, [None] * 4),
            ("b", "toy", [True] * 4, [1.0] * 4, [10] * 4, [None] * 4),
            ("c", "other", [True, False, False, True], [1.0, 0.5, 0.5, 1.0], [10] * 4, [None] * 4),
            (
                "d",
                "toy",
                [False] * 4,
                [0.0, 0.0, 0.5, 0.0],
                [10, 64, 10, 10],
                ["missing_think", "truncated", None, "missing_think"],
            ),
            ("e", "other", [False] * 4, [0.5] * 4, [10] * 4, [None] * 4),
            ("f", "toy", [False] * 4, [0.0] * 4, [10] * 4, ["missing_label"] * 4),
        ]
    ]
    assert ids(tmp_path / "out") == ["a", "d", "e", "f"]
    assert list(read_corpus(tmp_path / "out")) == [PLANS[at] for at in (0, 3, 4, 5)]
    assert read_info(tmp_path / "out") == CorpusInfo(name="hard", seed=1, sources=SOURCES, rows=4)
    assert report_in(tmp_path / "out") == {
        "rows": 6,
        "drawn": 6,
        "judged": 6,
        "kept": 4,
        "failed": {},
        "skipped": {},
        "coverage": 17 / 24,
        "tokens_mean": (23 * 10 + 64) / 24,
        "right": [4, 0, 1, 0, 1],
        "sources": {"other": [1, 0, 1, 0, 0], "toy": [3, 0, 0, 0, 1]},
    }
    assert (report.judged, report.kept, report.right) == (6, 4, (4, 0, 1, 0, 1))


def test_mixed_keeps_rows_with_right_and_wrong_answers(tmp_path: Path) -> None:
    mined(recipe(keep="mixed"), corpus(tmp_path / "toy", *PLANS), Planned(), tmp_path / "out")
    assert ids(tmp_path / "out") == ["c"]


def test_a_row_is_right_only_with_both_labels(tmp_path: Path) -> None:
    both = row("both", response="Flour.", response_label="unharmful")
    said = {
        0: ("unharmful", "unharmful"),
        1: ("unharmful", "harmful"),
        2: ("harmful", "unharmful"),
        3: ("none", "none"),
    }
    engine = Planned(lambda _, number: EngineResult(answer(*said[number]), "stop"))
    mined(recipe(keep="mixed"), corpus(tmp_path / "toy", both), engine, tmp_path / "out")
    (line,) = lines(tmp_path / "out")
    assert (line["right"], line["safety"]) == ([True, False, False, False], [1.0, 0.5, 0.5, 0.0])
    assert line["reasons"] == [None, None, None, "missing_label"]


@pytest.mark.parametrize("right", list(product((True, False), repeat=4)))
def test_the_rules(right: tuple[bool, ...]) -> None:
    rules: list[KeepRule] = ["all_wrong", "mixed", "mostly_right"]
    assert [is_kept(right, rule) for rule in rules] == [sum(right) == 0, 0 < sum(right) < 4, sum(right) == 3]


def test_other_numbers_of_candidates(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "toy", row("a", "W"), row("b", "R"))
    report = mined(recipe(candidates=1), folder, Planned(), tmp_path / "one")
    assert (report.right, ids(tmp_path / "one")) == ((1, 1), ["a"])
    report = mined(
        recipe(candidates=6), corpus(tmp_path / "six", row("a", "WWWWWR"), row("b")), Planned(), tmp_path / "6"
    )
    assert (report.right, ids(tmp_path / "6")) == ((1, 1, 0, 0, 0, 0, 0), ["b"])


# --- what is asked --------------------------------------------------------------------------------------


def test_candidates_are_asked_as_judging_asks(tmp_path: Path) -> None:
    path = tmp_path / "cake.png"
    path.write_bytes(image(60, 40).png)
    shown = row("shown", modality="text-image", images=(str(path),), response="Yes.")
    engine = Planned()
    settings = recipe(temperature=0.7, top_p=0.8, max_new_tokens=99)
    mined(settings, corpus(tmp_path / "toy", row("a"), shown), engine, tmp_path / "out")
    assert engine.calls == [8]
    first, second = engine.requests[:4], engine.requests[4:]
    for sample, requests in ((row("a"), first), (shown, second)):
        assert {request.messages for request in requests} == {build_messages(sample.exchange())}
        assert {len(request.images) for request in requests} == {len(sample.images)}
    assert (second[0].images[0].width, second[0].images[0].height) == (60, 40)
    assert all(
        (r.temperature, r.top_p, r.max_new_tokens, r.ban_empty_think, r.forced_prefix, r.pixels, r.label_fields)
        == (0.7, 0.8, 99, True, "", None, ())
        for r in engine.requests
    )
    assert len({request.seed for request in engine.requests}) == 8
    assert len({replace(request, seed=None) for request in engine.requests}) == 2


def test_seeds_depend_on_neither_chunks_nor_neighbours(tmp_path: Path) -> None:
    rows = [row(f"r{number}") for number in range(5)]
    seeds = []
    for name, subset, chunk in (("one", rows, 1), ("all", rows, 64), ("few", rows[3:1:-1], 2)):
        engine = Planned()
        mined(recipe(), corpus(tmp_path / f"toy-{name}", *subset), engine, tmp_path / name, chunk=chunk)
        assert max(engine.calls) <= 4 * chunk
        seeds.append({(request.messages, at % 4): request.seed for at, request in enumerate(engine.requests)})
    assert seeds[0] == seeds[1]
    assert len(seeds[2]) == 8
    assert seeds[2].items() <= seeds[1].items()
    engine = Planned()
    mined(recipe(seed=2), tmp_path / "toy-few", engine, tmp_path / "other")
    assert not {request.seed for request in engine.requests} & set(seeds[2].values())


@given(st.integers(), st.text(), st.integers(0, 15), st.integers(0, 15))
def test_seeds_differ_between_candidates(seed: int, name: str, first: int, other: int) -> None:
    assert 0 <= candidate_seed(seed, name, first) < 2**48
    assert (candidate_seed(seed, name, first) == candidate_seed(seed, name, other)) == (first == other)


def test_seeds_stay_what_they_are() -> None:
    """SHA-256 of "1-0-toy" begins with these 6 bytes: another seed would give other candidates on resume."""
    assert candidate_seed(1, "toy", 0) == 0x30A3ED47D95C
    assert candidate_seed(1, "1", 12) != candidate_seed(1, "2-1", 1)


def test_only_labelled_training_rows_are_asked_each_once(tmp_path: Path) -> None:
    rows = [
        row("repeated", split="validation"),
        row("repeated", meta={"repeat": 3}),
        row("held", split="validation"),
        row("tested", split="test"),
        row("unlabelled", request_label=None),
        row("absent", request_label=None, response_label="harmful"),
        row("empty", prompt=" "),
        row("repeated", "RRRR"),
        row("unlabelled", "RRRR"),
    ]
    engine = Planned()
    report = mined(recipe(), corpus(tmp_path / "toy", *rows), engine, tmp_path / "out")
    assert engine.asked == {"repeated": 4}
    assert list(read_corpus(tmp_path / "out")) == rows[1:2]
    assert (report.rows, report.drawn, report.judged) == (6, 1, 1)
    assert report_in(tmp_path / "out")["skipped"] == {"no label": 2, "nothing to judge": 1, REPEATED: 2}
    assert lines(tmp_path / "out", SKIPPED) == [
        {"id": "unlabelled", "reason": "no label"},
        {"id": "absent", "reason": "no label"},
        {"id": "empty", "reason": "nothing to judge"},
        {"id": "repeated", "reason": REPEATED},
        {"id": "unlabelled", "reason": REPEATED},
    ]


def test_a_teachers_labels_count(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "toy", row("a", "RRRR"), row("b", "RRRR", request_label=None))
    attempt = Attempt(id="b", reasoning="Looked.", teacher="t", request_label="harmful", votes={"request": 3})
    (folder / REASONING).write_text(attempt.model_dump_json() + "\n")
    mined(recipe(), folder, Planned(), tmp_path / "out")
    (kept,) = read_corpus(tmp_path / "out")
    assert (kept.id, kept.request_label, kept.reasoning) == ("b", "harmful", "Looked.")


def test_a_limit_draws_the_same_rows_again(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "toy", *(row(f"r{number}") for number in range(40)), row("none", request_label=None))
    drawn = {}
    for seed in (1, 2):
        engine = Planned()
        report = mined(recipe(seed, limit=6), folder, engine, tmp_path / f"out{seed}", chunk=4)
        assert (report.rows, report.drawn, report.judged, report.skipped.total) == (41, 6, 6, 1)
        assert engine.calls == [16, 8]
        assert ids(tmp_path / f"out{seed}") == sorted(engine.asked, key=lambda name: int(name[1:]))
        drawn[seed] = set(engine.asked)
        mined(recipe(seed, limit=6), folder, engine, tmp_path / f"out{seed}")
        assert engine.calls == [16, 8]
    assert drawn[1] != drawn[2]
    assert mined(recipe(limit=99), folder, Planned(), tmp_path / "all").drawn == 40


# --- runs that stop -------------------------------------------------------------------------------------

FILES = (
    mine.CANDIDATES,
    mine.SETTINGS,
    mine_report.REPORT,
    mine_report.FIGURE,
    ROWS,
    INFO,
    SKIPPED,
)


@pytest.mark.parametrize("torn", [b'{"id":"r4","sou', b'{"id":"r4"}', b"\xff", b""])
def test_a_stopped_run_resumes(torn: bytes, tmp_path: Path) -> None:
    rows = [row(f"r{number}", ("WWWW", "RWUT", "RRRR")[number % 3], source=f"s{number % 2}") for number in range(9)]
    folder = corpus(tmp_path / "toy", *rows)
    mined(recipe(), folder, Planned(), tmp_path / "whole", chunk=2)
    engine, out = Planned(), tmp_path / "out"
    engine.stop_at = 2
    with pytest.raises(RuntimeError, match="killed"):
        mined(recipe(), folder, engine, out, chunk=2)
    assert [line["id"] for line in lines(out)] == ["r0", "r1", "r2", "r3"]
    assert not (out / ROWS).exists()
    with (out / mine.CANDIDATES).open("ab") as stream:
        stream.write(torn)
    seen: list[tuple[int, int]] = []
    again = Planned()
    mined(recipe(), folder, again, out, chunk=3, progress=lambda done, total: seen.append((done, total)))
    assert again.asked == {f"r{number}": 4 for number in range(4, 9)}
    assert seen == [(7, 9), (9, 9)]
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_chunk_is_on_the_disk_before_the_next_is_asked(tmp_path: Path) -> None:
    out, sizes = tmp_path / "out", []

    def look(name: str, number: int) -> EngineResult:
        sizes.append(len(lines(out)))
        return says("W")

    folder = corpus(tmp_path / "toy", *(row(f"r{number}") for number in range(3)))
    mined(recipe(candidates=1), folder, Planned(look), out, chunk=1)
    assert sizes == [0, 1, 2]


def test_a_finished_run_asks_nothing(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "toy", *PLANS), tmp_path / "out"
    first = mined(recipe(), folder, Planned(), out)
    before = {name: (out / name).read_bytes() for name in FILES}
    engine = Planned()
    assert mined(recipe(), folder, engine, out) == first
    assert engine.calls == []
    assert {name: (out / name).read_bytes() for name in FILES} == before


def test_other_settings_are_refused(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "toy", *PLANS), tmp_path / "out"
    mined(recipe(), folder, Planned(), out)
    engine = Planned()
    relabelled = corpus(tmp_path / "relabelled", *PLANS[:-1], row("f", request_label="harmful"))
    for changed, settings, data in (
        ("mine.temperature", recipe(temperature=0.5), folder),
        ("mine.candidates, mine.top_p", recipe(candidates=3, top_p=0.5), folder),
        ("mine.keep", recipe(keep="mixed"), folder),
        ("mine.limit", recipe(limit=2), folder),
        ("seed", recipe(seed=2), folder),
        ("corpus.digest", recipe(), relabelled),
    ):
        with pytest.raises(
            DataError, match=rf"mined rows with other inputs \(changed: {changed}\); restore them or name a new output"
        ):
            mined(settings, data, engine, out)
    with pytest.raises(DataError, match=r"changed: model\.revision\)"):
        mined(recipe(), folder, Renamed(), out)
    assert engine.calls == []
    other = parse_recipe({**recipe().model_dump(), "name": "renamed", "grpo": {"epochs": 2}})
    mined(other, folder, engine, out)
    assert engine.calls == []


def test_a_corpus_that_moved_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "cake.png").write_bytes(image(60, 40).png)
    shown = row("shown", modality="text-image", images=(str(tmp_path / "cake.png"),))
    folder, out = corpus(tmp_path / "toy", shown, embed=True), tmp_path / "out"
    mined(recipe(), folder, Planned(), out)
    moved = folder.rename(tmp_path / "moved")
    engine = Planned()
    mined(recipe(), moved, engine, out)
    assert engine.calls == []
    (kept,) = read_corpus(out)
    assert kept.images[0].startswith(str(moved))


def test_another_folders_files_are_left_alone(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "toy", *PLANS)
    before = (folder / ROWS).read_bytes()
    engine = Planned()
    with pytest.raises(DataError, match="a corpus that `mine` did not make; give a new --out"):
        mined(recipe(), folder, engine, folder)
    assert (folder / ROWS).read_bytes() == before
    out = tmp_path / "out"
    mined(recipe(), folder, engine, out)
    (out / mine.SETTINGS).unlink()
    with pytest.raises(DataError, match="`mine` did not make"):
        mined(recipe(), folder, engine, out)
    (out / INFO).unlink()
    with pytest.raises(DataError, match="candidates of 4 rows that are not drawn"):
        mined(recipe(limit=2), folder, engine, out)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "toy", *PLANS), tmp_path / "out"
    mined(recipe(), folder, Planned(), out)
    with (out / mine.CANDIDATES).open("a") as stream:
        stream.write('{"id": "g"}\n')
    with pytest.raises(DataError, match="line 7: not a row's candidates; remove the line"):
        mined(recipe(), folder, Planned(), out)


# --- rows without an answer -----------------------------------------------------------------------------


def test_a_fault_is_no_candidate(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"no image")
    torn = row("torn", modality="image", images=(str(tmp_path / "torn.png"),))
    folder = corpus(tmp_path / "toy", row("a"), row("b", "WWWE"), torn, row("c", "EEEE"), row("d", "LLLL"), row("e"))
    engine, out = Planned(), tmp_path / "out"
    seen: list[tuple[int, int]] = []
    report = mined(recipe(), folder, engine, out, chunk=3, progress=lambda *now: seen.append(now))
    assert ids(out) == ["a", "e"]
    assert (report.drawn, report.judged, report.kept, report.right) == (6, 2, 2, (2, 0, 0, 0, 0))
    assert report_in(out)["failed"] == {"engine": 2, "input_too_long": 1, "invalid_image": 1}
    assert report.coverage == 1.0
    assert [(line["id"], line["reason"]) for line in lines(out, SKIPPED)] == [
        ("b", "engine"),
        ("torn", "invalid_image"),
        ("c", "engine"),
        ("d", "input_too_long"),
    ]
    assert engine.calls == [8, 12]
    assert seen == [(3, 6), (6, 6)]
    mended = Planned(lambda name, number: says("W" if name == "b" else "R"))
    report = mined(recipe(), folder, mended, out)
    assert mended.asked == {"b": 4, "c": 4, "d": 4}
    assert ids(out) == ["a", "b", "e"]
    assert (report.judged, report.failed.reasons, report.right) == (5, {"invalid_image": 1}, (3, 0, 0, 0, 2))


def test_rows_that_failed_in_between_make_the_same_corpus(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "toy", *PLANS)
    mined(recipe(), folder, Planned(), tmp_path / "whole")
    plans = {sample.id: sample.prompt.partition(":")[2] for sample in PLANS}
    ill = Planned(lambda name, number: says("E" if name in "ab" else plans[name][number]))
    mined(recipe(), folder, ill, tmp_path / "out")
    assert ids(tmp_path / "out") == ["d", "e", "f"]
    mined(recipe(), folder, Planned(), tmp_path / "out")
    for name in set(FILES) - {mine.CANDIDATES}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert sorted(lines(tmp_path / "out"), key=lambda line: line["id"]) == lines(tmp_path / "whole")


def test_an_engine_that_is_gone_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FAULTS_IN_A_ROW", 3)
    rows = [row("a"), row("b", "E"), row("c", "E"), row("d"), *(row(f"e{number}", "E") for number in range(9))]
    folder, out, engine = corpus(tmp_path / "toy", *rows), tmp_path / "out", Planned()
    with pytest.raises(EngineError, match=r"3 consecutive rows got no answer \(out of order; try again\)"):
        mined(recipe(), folder, engine, out, chunk=1)
    assert len(engine.calls) == 7
    assert [line["id"] for line in lines(out)] == ["a", "d"]
    long = corpus(tmp_path / "long", row("a"), *(row(f"e{number}", "L") for number in range(9)))
    assert mined(recipe(), long, Planned(), tmp_path / "longs", chunk=1).failed.total == 9


def test_an_engine_that_loses_answers_is_refused(tmp_path: Path) -> None:
    class Loses(Planned):
        def generate(self, requests: Sequence[EngineRequest]) -> list[EngineResult]:
            return super().generate(requests)[:-1]

    with pytest.raises(EngineError, match="gave 7 results for 8 requests; use another engine"):
        mined(recipe(), corpus(tmp_path / "toy", row("a"), row("b")), Loses(), tmp_path / "out")
    assert lines(tmp_path / "out") == []


# --- nothing to show ------------------------------------------------------------------------------------


def test_nothing_kept_says_what_to_change(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "toy", row("a", "RRRR"), row("b", "RWRR")), tmp_path / "out"
    with pytest.raises(
        DataError, match=r"none of 2 rows has wrong answers only; set mine\.keep: mixed, or use a new --out"
    ):
        mined(recipe(), folder, Planned(), out)
    assert [line["id"] for line in lines(out)] == ["a", "b"]
    assert report_in(out)["right"] == [0, 0, 0, 1, 1]
    assert (out / mine_report.FIGURE).is_file()
    assert not (out / ROWS).exists()
    engine = Planned()
    assert mined(recipe(keep="mixed"), folder, engine, out).kept == 1
    assert (engine.calls, ids(out)) == ([], ["b"])
    with pytest.raises(DataError, match=r"changed: mine\.keep\)"):
        mined(recipe(), folder, engine, out)
    with pytest.raises(DataError, match=r"none of 1 rows has right and wrong answers; set mine\.keep: all_wrong"):
        mined(recipe(keep="mixed"), corpus(tmp_path / "same", row("a")), engine, tmp_path / "other")
    with pytest.raises(
        DataError, match=r"none of 1 rows has more right than wrong answers, and a wrong one; set .*mixed"
    ):
        mined(recipe(keep="mostly_right"), corpus(tmp_path / "half", row("a", "RRWW")), engine, tmp_path / "third")


def test_nothing_answered_says_why(tmp_path: Path) -> None:
    folder, out = corpus(tmp_path / "toy", row("a", "EEEE")), tmp_path / "out"
    with pytest.raises(DataError, match=r"none of 1 rows could be judged \(out of order; try again\)"):
        mined(recipe(), folder, Planned(), out)
    report = report_in(out)
    assert (report["coverage"], report["tokens_mean"], report["right"]) == (None, None, [0, 0, 0, 0, 0])


def test_nothing_to_ask_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "toy", row("a", request_label=None), row("b", split="test"))
    with pytest.raises(DataError, match="no labelled row of the split train"):
        mined(recipe(), folder, Planned(), tmp_path / "out")
    with pytest.raises(DataError, match=r"no corpus\.json"):
        mined(recipe(), tmp_path, Planned(), tmp_path / "out")
    with pytest.raises(InputError, match="give at least 1"):
        mined(recipe(), folder, Planned(), tmp_path / "out", chunk=0)
    assert not (tmp_path / "out").exists()


# --- what is written ------------------------------------------------------------------------------------


def test_no_content_is_written_beside_the_corpus(tmp_path: Path) -> None:
    engine = Planned(lambda name, number: says("E" if name == "b" else "U"))
    rows = (row("a", prompt="SECRET [a:U]"), row("b", prompt="SECRET [b:E]"))
    mined(recipe(), corpus(tmp_path / "toy", *rows), engine, tmp_path / "out")
    for name in set(FILES) - {ROWS}:
        content = (tmp_path / "out" / name).read_text()
        assert "SECRET" not in content
        assert "I would say" not in content


def test_the_figure_shows_every_source(tmp_path: Path) -> None:
    rows = [row("a", source="fine $bread$"), row("b", "RRRW", source="plain"), row("c", "RRRR", source="plain")]
    report = mined(recipe(), corpus(tmp_path / "toy", *rows), Planned(), tmp_path / "out")
    drawn = (tmp_path / "out" / mine_report.FIGURE).read_text()
    assert drawn.startswith("<svg")
    assert drawn == mine_report.pass_rates(report)
    for text in ("all (3)", "fine $bread$ (1)", "plain (2)", "right answers of 4"):
        assert f"<!-- {text} -->" in drawn
    assert drawn != mine_report.pass_rates(replace(report, right=(0, 1, 0, 1, 1)))


def test_a_model_is_mined_with(tmp_path: Path, tiny_model: Path) -> None:
    from guardreasoner_vl.engines.transformers_engine import TransformersEngine

    (tmp_path / "cake.png").write_bytes(image(60, 40).png)
    shown = row("shown", modality="image", prompt="", images=(str(tmp_path / "cake.png"),))
    folder = corpus(tmp_path / "toy", row("a"), shown, row("b", response="Flour."), row("long", prompt="cake " * 600))
    engine = TransformersEngine.load(str(tiny_model), dtype="fp32")
    seen: list[tuple[int, int]] = []
    settings = recipe(max_new_tokens=16)
    report = mined(settings, folder, engine, tmp_path / "out", chunk=2, progress=lambda *now: seen.append(now))
    assert (report.judged, report.kept, report.failed.reasons) == (3, 3, {"input_too_long": 1})
    assert (report.coverage, seen) == (0.0, [(2, 4), (4, 4)])
    assert ids(tmp_path / "out") == ["a", "shown", "b"]
    for candidates in read_candidates(tmp_path / "out" / mine.CANDIDATES):
        assert not any(candidates.right)
        assert all(0 < tokens <= 16 for tokens in candidates.tokens)
    before = (tmp_path / "out" / mine.CANDIDATES).read_bytes()
    mined(settings, folder, engine, tmp_path / "out")
    assert (tmp_path / "out" / mine.CANDIDATES).read_bytes() == before
