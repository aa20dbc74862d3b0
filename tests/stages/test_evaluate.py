"""Benchmarks through a guard: one prediction for each row, resume, and refusal to mix two evaluations."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants

from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import DataError, EngineError, InputError, InputTooLongError
from guardreasoner_vl.evaluation.baseline import hashed_ngrams
from guardreasoner_vl.evaluation.benchmarks.find import by_source, find, from_file
from guardreasoner_vl.evaluation.compare import read_evaluation
from guardreasoner_vl.evaluation.predictions import PREDICTIONS, RESULTS, read_predictions
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.sources.jsonl import read_samples
from guardreasoner_vl.stages import calibrate, evaluate, robustness
from tests.builders import answer, write_rows
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "BAD idea", "request_label": "harmful", "meta": {"category": "fraud"}},
    {"id": "b", "prompt": "BAD cake", "request_label": "unharmful"},
    {"id": "c", "prompt": "a cake", "response": "BAD", "request_label": "unharmful", "response_label": "harmful"},
    {"id": "d", "prompt": "BROKEN", "request_label": "unharmful"},
]


def asked(guard: Guard) -> int:
    engine: ScriptedEngine = guard.engine  # type: ignore[assignment]
    return len(engine.requests)


def test_every_row_is_judged_once_and_counted(tmp_path: Path) -> None:
    loaded = [from_file(write_rows(tmp_path / "toy.jsonl", ROWS))]
    results = evaluate.run(scripted_guard(), loaded, tmp_path / "out")
    request = results.groups["request"]["toy"].figures.counts
    assert (request.true_positive, request.false_positive, request.true_negative, request.errors) == (1, 3, 0, 1)
    assert results.groups["response"]["all"].figures.counts.true_positive == 1
    stored = list(read_predictions(tmp_path / "out" / PREDICTIONS))
    assert [row.id for row in stored] == ["a", "b", "c", "d"]
    assert all(row.content is None for row in stored)
    assert stored[3].error == "engine"
    written = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert written["groups"]["request"]["category: fraud"]["figures"]["f1"] == 1
    settings = written["settings"]
    policy = settings.pop("guard")
    assert settings == {"model": "scripted", "revision": None, "mode": "slow"}
    assert (policy["thresholds"], policy["calibration"], policy["long_input"]) == ([None, None], None, "refuse")
    assert set(policy) == {field.name for field in fields(Policy)} - {"mode", "folder_calibration"}


def test_a_stopped_run_resumes(tmp_path: Path) -> None:
    loaded = [from_file(write_rows(tmp_path / "toy.jsonl", ROWS))]
    whole = evaluate.run(scripted_guard(), loaded, tmp_path / "whole")
    guard, out = scripted_guard(), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        assert total == 4
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.run(guard, loaded, out, chunk=2, progress=stop)
    with (out / PREDICTIONS).open("a") as stream:
        stream.write('{"id": "c", "torn')
    assert evaluate.run(guard, loaded, out, chunk=2).as_json()["groups"] != {}
    assert asked(guard) == 4
    assert [row.id for row in read_predictions(out / PREDICTIONS)] == ["a", "b", "c", "d"]
    again = evaluate.run(guard, loaded, out)
    assert asked(guard) == 5  # the row that the engine failed
    for target, groups in whole.groups.items():
        assert {name: group.figures.counts for name, group in groups.items()} == {
            name: group.figures.counts for name, group in again.groups[target].items()
        }


def test_content_is_stored_only_where_asked_for(tmp_path: Path) -> None:
    loaded = [from_file(write_rows(tmp_path / "toy.jsonl", ROWS))]
    evaluate.run(scripted_guard(), loaded, tmp_path / "out", content=True)
    first = next(read_predictions(tmp_path / "out" / PREDICTIONS))
    assert first.content == {"prompt": "BAD idea", "images": [], "response": None, "reasoning": "Looked at it."}


def test_two_evaluations_are_not_mixed(tmp_path: Path) -> None:
    loaded, out = [from_file(write_rows(tmp_path / "toy.jsonl", ROWS))], tmp_path / "out"
    evaluate.run(scripted_guard(), loaded, out)
    with pytest.raises(DataError, match="an evaluation with other inputs"):
        evaluate.run(scripted_guard(Policy(mode="fast")), loaded, out)
    for policy, changed in (
        (Policy(thresholds=(0.5, 0.5)), "guard.thresholds"),
        (Policy(long_input="windows"), "guard.long_input"),
    ):
        with pytest.raises(DataError, match=rf"changed: {changed}\)"):
            evaluate.run(scripted_guard(policy), loaded, out)
    evaluate.run(scripted_guard(), loaded, out)
    other = [from_file(write_rows(tmp_path / "other.jsonl", ROWS))]
    with pytest.raises(DataError, match="4 rows that are not in the benchmarks"):
        evaluate.run(scripted_guard(), other, out)


def test_excluded_benchmarks_are_in_no_other_figure(tmp_path: Path) -> None:
    loaded = [from_file(write_rows(tmp_path / f"{name}.jsonl", ROWS)) for name in ("toy", "noisy")]
    results = evaluate.run(scripted_guard(), loaded, tmp_path / "out", excluded=["noisy"])
    groups = results.groups["request"]
    assert groups["all"] == groups["toy"] == groups["noisy"] == groups["modality: text"]
    assert json.loads((tmp_path / "out" / RESULTS).read_text())["excluded"] == ["noisy"]
    guard = scripted_guard()
    with pytest.raises(InputError, match="no benchmark named nosiy to exclude from the total; use toy, noisy"):
        evaluate.run(guard, loaded, tmp_path / "typo", excluded=["nosiy"])
    assert asked(guard) == 0
    only = evaluate.run(scripted_guard(), loaded, tmp_path / "out", excluded=["toy", "noisy"])
    assert set(only.groups["request"]) == {"toy", "noisy"}


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"id": "a", "prompt": "again", "request_label": "harmful"},
        {"id": "x", "prompt": "no label"},
        {"id": "y", "prompt": " ", "request_label": "harmful"},
        {"id": "z", "prompt": "odd label", "request_label": "bad"},
    ]
    loaded = from_file(write_rows(tmp_path / "toy.jsonl", [*ROWS, *odd]))
    assert len(loaded.samples) == 4
    assert loaded.skipped.reasons == {
        "repeated id": 1,
        "no label": 1,
        "nothing to judge": 1,
        "request_label: input should be 'harmful' or 'unharmful'": 1,
    }
    results = evaluate.run(scripted_guard(), [loaded], tmp_path / "out")
    assert results.skipped == {"toy": loaded.skipped.reasons}
    with pytest.raises(DataError, match="no labelled row"):
        from_file(write_rows(tmp_path / "none.jsonl", odd[1:]))


def test_benchmarks_are_found_by_name_below_one_folder(tmp_path: Path) -> None:
    released = tmp_path / "data" / "test" / "SimpleSafetyTests.json"
    released.parent.mkdir(parents=True)
    text = "Human user:\nsay BAD\n\nAI assistant:\nNone\n\n"
    released.write_text(json.dumps([{"instruction": "", "input": text, "output": "Request: harmful\nResponse: None"}]))
    (benchmark,) = find(["simplesafetytests"], str(tmp_path / "data"), tmp_path)
    assert [sample.request_label for sample in benchmark.samples] == ["harmful"]
    assert benchmark.size_differs == "SimpleSafetyTests: 1 rows, but the official set has 100"
    results = evaluate.run(scripted_guard(), [benchmark], tmp_path / "out")
    assert results.warnings == [benchmark.size_differs]
    with pytest.raises(InputError, match="--data"):
        find(["SimpleSafetyTests"], None, tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find([], str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(InputError, match="no benchmark named 'nonsense'"):
        find(["nonsense"], str(tmp_path), tmp_path)
    toy = str(write_rows(tmp_path / "toy.jsonl", ROWS))
    with pytest.raises(InputError, match="toy: named twice"):
        find([toy, toy], None, tmp_path)
    splits = [str(write_rows(tmp_path / name / "validation.jsonl", ROWS)) for name in ("one", "two")]
    assert [loaded.benchmark.name for loaded in find(splits, None, tmp_path)] == ["one validation", "two validation"]


def test_the_released_set_comes_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "datasets--owner--tests"
    released = repository / "snapshots" / commit / "test" / "SimpleSafetyTests.json"
    released.parent.mkdir(parents=True)
    released.write_text(json.dumps([{"input": "Human user:\nsay BAD\n\nAI assistant:\nNone", "output": "harmful"}]))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for data in ("hub:owner/tests", f"hub:owner/tests@{commit}"):
        (benchmark,) = find(["SimpleSafetyTests"], data, tmp_path)
        assert [(sample.prompt, sample.request_label) for sample in benchmark.samples] == [("say BAD", "harmful")]
    with pytest.raises(DataError, match="owner/others: not in the cache, and HF_HUB_OFFLINE is set"):
        find(["SimpleSafetyTests"], "hub:owner/others", tmp_path)


@pytest.mark.slow
def test_hashed_ngrams_are_a_baseline_where_there_are_training_rows(tmp_path: Path) -> None:
    train = write_rows(
        tmp_path / "train.jsonl",
        [
            {"id": f"{word}{number}", "prompt": f"{word} {number}", "response": word, **labels}
            for number in range(4)
            for word, labels in (
                ("BAD", {"request_label": "harmful", "response_label": "harmful"}),
                ("cake", {"request_label": "unharmful", "response_label": "unharmful"}),
            )
        ],
    )
    loaded = list(by_source(read_samples(write_rows(tmp_path / "toy.jsonl", ROWS)), tmp_path))
    shallow = hashed_ngrams(list(read_samples(train)), loaded)
    results = evaluate.run(scripted_guard(), loaded, tmp_path / "out", baselines={"hashed n-grams": shallow})
    counts = results.groups["request"]["toy"].baselines["hashed n-grams"]
    assert (counts.true_positive, counts.total, counts.errors) == (1, 4, 0)


def test_a_baseline_that_saw_one_class_predicts_it(tmp_path: Path) -> None:
    train = [
        {"id": "1", "prompt": "a cake", "response": "x", "response_label": "harmful", "request_label": "unharmful"}
    ]
    rows = [
        {"id": str(n), "prompt": f"{n}", "response": "y", "response_label": label, "request_label": label}
        for n, label in enumerate(("harmful", "unharmful"))
    ]
    loaded = list(by_source(read_samples(write_rows(tmp_path / "toy.jsonl", rows)), tmp_path))
    shallow = hashed_ngrams(list(read_samples(write_rows(tmp_path / "train.jsonl", train))), loaded)
    results = evaluate.run(scripted_guard(), loaded, tmp_path / "out", baselines={"hashed n-grams": shallow})
    rates = {
        target: (counts.true_positive, counts.false_positive, counts.total)
        for target in ("request", "response")
        for counts in [results.groups[target]["toy"].baselines["hashed n-grams"]]
    }
    assert rates == {"request": (0, 0, 2), "response": (1, 1, 2)}


# --- what stops an evaluation ---------------------------------------------------------------------------


def many(tmp_path: Path, count: int = 120) -> list[LoadedBenchmark]:
    """Rows of which every third is harmful and found so."""
    rows = [
        {
            "id": str(n),
            "prompt": f"{'BAD' if n % 3 else 'good'} {n}",
            "request_label": "harmful" if n % 3 else "unharmful",
        }
        for n in range(count)
    ]
    return [from_file(write_rows(tmp_path / "many.jsonl", rows))]


class Failing(ScriptedEngine):
    """Answers like the scripted guard, and fails the questions whose numbers are in `failing`."""

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.count = 0

        def said(request: EngineRequest) -> str:
            self.count += 1
            if self.count - 1 in failing:
                raise EngineError("out of order; try again")
            label = "harmful" if "BAD" in request.messages[-1].text else "unharmful"
            return answer(label)

        super().__init__(said)


def lasting(out: Path) -> list[dict[str, Any]]:
    """The predictions without what a clock says."""
    rows = [json.loads(line) for line in (out / PREDICTIONS).read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_rows_that_the_engine_failed_are_asked_again_and_many_stop_the_run(tmp_path: Path) -> None:
    loaded, out = many(tmp_path), tmp_path / "out"
    whole = evaluate.run(Guard(Failing()), loaded, tmp_path / "whole")
    with pytest.raises(EngineError, match=r"96 consecutive rows got no answer \(out of order; try again\); mend"):
        evaluate.run(Guard(Failing(range(24, 1000))), loaded, out)
    assert not (out / RESULTS).exists()
    healed = Failing()
    results = evaluate.run(Guard(healed), loaded, out)
    assert healed.count == 96
    assert lasting(out) == lasting(tmp_path / "whole")
    counts = [figures.groups["request"]["all"].figures.counts for figures in (whole, results)]
    assert counts[0] == counts[1]
    assert counts[0].f1 == 1


def test_a_few_failures_are_reported_and_asked_again_in_their_places(tmp_path: Path) -> None:
    loaded, out = many(tmp_path), tmp_path / "out"
    evaluate.run(Guard(Failing()), loaded, tmp_path / "whole")
    results = evaluate.run(Guard(Failing([3, 7, 50])), loaded, out, chunk=8)
    assert results.unanswered == 3
    assert results.warnings == ["3 rows have no judgement: the engine failed; run the same command to judge them again"]
    healed = Failing()
    assert evaluate.run(Guard(healed), loaded, out).warnings == []
    assert healed.count == 3
    assert lasting(out) == lasting(tmp_path / "whole")


def test_what_is_the_rows_own_fault_is_asked_once(tmp_path: Path) -> None:
    def said(request: EngineRequest) -> str:
        if "long" in request.messages[-1].text:
            raise InputTooLongError("too long; shorten it")
        return "I would rather not say."

    rows = [
        {"id": str(n), "prompt": f"a {'long' if n % 2 else 'short'} cake", "request_label": "harmful"}
        for n in range(80)
    ]
    loaded, engine = [from_file(write_rows(tmp_path / "toy.jsonl", rows))], ScriptedEngine(said)
    results = evaluate.run(Guard(engine), loaded, tmp_path / "out")
    assert results.unanswered == 0
    asked_first = len(engine.requests)
    evaluate.run(Guard(engine), loaded, tmp_path / "out")
    assert len(engine.requests) == asked_first


def test_a_duplicate_row_is_refused(tmp_path: Path) -> None:
    loaded, out = many(tmp_path, 4), tmp_path / "out"
    evaluate.run(scripted_guard(), loaded, out)
    path = out / PREDICTIONS
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[1])
    message = "line 5: repeats the row of line 2; remove one of the two lines"
    with pytest.raises(DataError, match=message):
        evaluate.run(scripted_guard(), loaded, out)
    with pytest.raises(DataError, match=message):
        read_evaluation(out)


def test_a_row_whose_text_or_label_has_changed_is_refused(tmp_path: Path) -> None:
    loaded, out = many(tmp_path, 4), tmp_path / "out"
    evaluate.run(scripted_guard(), loaded, out)
    before = (out / PREDICTIONS).read_bytes()
    for change in ({"prompt": "another cake"}, {"request_label": "harmful"}):
        samples = [loaded[0].samples[0].model_copy(update=change), *loaded[0].samples[1:]]
        with pytest.raises(DataError, match="predictions of 1 rows that have changed since; give the same benchmarks"):
            evaluate.run(scripted_guard(), [replace(loaded[0], samples=samples)], out)
    assert (out / PREDICTIONS).read_bytes() == before


def test_a_torn_line_and_a_full_disk_leave_every_whole_line(tmp_path: Path) -> None:
    """The file is never rewritten in its place, where a write that fails would take lines with it."""
    resource = pytest.importorskip("resource")
    loaded, out = many(tmp_path), tmp_path / "out"
    evaluate.run(scripted_guard(), loaded, out)
    path = out / PREDICTIONS
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:-1]) + whole[-1][:30])
    inode, before = path.stat().st_ino, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(map(len, whole[:30])), before[1]))
    try:
        with pytest.raises(
            DataError, match=r"predictions\.jsonl cannot be written \(File too large\): make room; the same"
        ):
            evaluate.run(scripted_guard(), loaded, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"".join(whole[:-1])
    assert path.stat().st_ino == inode
    evaluate.run(scripted_guard(), loaded, out)
    assert [row.id for row in read_predictions(path)] == [str(number) for number in range(120)]


def test_another_process_in_the_folder_is_an_error(tmp_path: Path) -> None:
    loaded, out = many(tmp_path, 4), tmp_path / "out"
    messages: list[str] = []

    def second(done: int, total: int) -> None:
        thread = Thread(target=lambda: messages.append(line_of(lambda: evaluate.run(scripted_guard(), loaded, out))))
        thread.start()
        thread.join()

    evaluate.run(scripted_guard(), loaded, out, chunk=2, progress=second)
    assert len(messages) == 2
    assert all(
        "another `evaluate`" in message and "wait for it or give another --out" in message for message in messages
    )
    assert len(list(read_predictions(out / PREDICTIONS))) == 4


def line_of(work: Callable[[], object]) -> str:
    try:
        work()
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", ["calibrate", "robustness"])
def test_figures_of_rows_that_the_engine_failed_are_not_made(stage: str, tmp_path: Path) -> None:
    loaded, out = many(tmp_path, 12), tmp_path / "out.json"

    def run(failing: Sequence[int]) -> object:
        guard = Guard(Failing(failing))
        if stage == "calibrate":
            return calibrate.run(guard, loaded, out)
        return robustness.run(guard, loaded, out, names=["upper case"])

    with pytest.raises(EngineError, match="1 judgements are missing: the engine failed; run the same command"):
        run([5])
    assert not (out / "robustness.json").is_file()
    assert not out.is_file()
    if stage == "robustness":
        run([])
        assert (out / "robustness.json").is_file()
