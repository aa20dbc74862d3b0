"""The release gate: its lists are varied and not trained on, and it fails a guard that is not good enough."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest

from benchmarks.quality import __main__ as quality
from benchmarks.quality import gate
from benchmarks.quality.examples import examples
from benchmarks.quality.gate import Earlier, failures, is_behind
from benchmarks.quality.lists import FOLDER, PLACES, SENTENCES, ListName, read_lines, request_list, spread, surrounded
from benchmarks.quality.measures import Measure
from benchmarks.quality.pages import pages
from benchmarks.quality.sets import ASSISTANT, XSTEST, public_sets
from guardreasoner_vl import guard as guards
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.errors import DataError, EngineError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.images.decode import decoded_images
from guardreasoner_vl.sources.jsonl import is_held_out
from tests.builders import answer, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guardreasoner_vl.engines.base import EngineRequest
    from guardreasoner_vl.judging.policy import Policy

    Use = Callable[[Callable[[str], bool]], Guard]

pytestmark = pytest.mark.slow
NAMES: tuple[ListName, ...] = get_args(ListName)
SOURCES = Path(__file__).parents[1] / "src" / "guardreasoner_vl" / "sources"
SHINGLE = 6
ALARMING = re.compile(
    r"kill|murder|dead|death|dying|lethal|shoot|shot|gun|knife|weapon|bomb|explo|attack|war\b|fight|beat|punch|choke|"
    r"poison|toxic|drug|opioid|heroin|overdose|addict|virus|malware|hack|phish|crack|jailbreak|brute|exploit|injection|"
    r"steal|stole|rob\b|robber|heist|burglar|scam|fraud|launder|smuggl|blood|bleed|burn|crash|destroy|abus|bull(y|ied)|"
    r"suicide|hate|racis|nazi|genocide|execut|terroris|hostage|porn|abortion|illegal|crime|criminal|nuke|nuclear|venom",
    re.IGNORECASE,
)
HARMFUL = [row.prompt for row in request_list("harmful").samples]


# --- the lists ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_list_is_long_and_varied(name: ListName) -> None:
    lines = read_lines(FOLDER / f"{name}.txt")
    kinds = Counter(kind for kind, _ in lines)
    assert len(lines) >= 200
    assert len(kinds) >= 20
    assert kinds["other languages"] >= 20
    assert max(kinds.values()) < len(lines) / 8
    lengths = sorted(len(text.split()) for _, text in lines)
    assert lengths[len(lengths) // 10] <= 8
    assert lengths[-5] > 50


def test_everyday_requests_sound_alarming_in_a_quarter_of_the_lines() -> None:
    english = [text for kind, text in read_lines(FOLDER / "everyday.txt") if kind != "other languages"]
    assert sum(bool(ALARMING.search(text)) for text in english) >= len(english) / 4


def test_no_line_occurs_twice() -> None:
    paths = (*(FOLDER / f"{name}.txt" for name in NAMES), SENTENCES)
    texts = Counter(" ".join(words(text)) for path in paths for _, text in read_lines(path))
    assert [text for text, times in texts.items() if times > 1] == []


def test_every_list_says_that_nothing_is_trained_on_it() -> None:
    for path in FOLDER.glob("*.txt"):
        head = path.read_text("utf-8").split("[", 1)[0]
        assert "Never train on these lines, never calibrate" in head


def test_no_line_shares_six_words_with_what_the_project_writes_for_training() -> None:
    written = training_shingles()
    assert len(written) > 100
    paths = (*(FOLDER / f"{name}.txt" for name in NAMES), SENTENCES)
    shared = {" ".join(both) for path in paths for _, text in read_lines(path) for both in shingles(text) & written}
    assert shared == set()


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def shingles(text: str) -> set[tuple[str, ...]]:
    """Runs of six words; those of short words alone, such as "what is the best way to", do not count."""
    tokens = words(text)
    runs = (tuple(tokens[at : at + SHINGLE]) for at in range(len(tokens) - SHINGLE + 1))
    return {run for run in runs if any(len(word) > 4 for word in run)}


def training_shingles() -> set[tuple[str, ...]]:
    """The shingles of the texts in the project's own sources; a slot such as {} ends a run of words."""
    result: set[tuple[str, ...]] = set()
    for path in SOURCES.rglob("*"):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        text = path.read_text("utf-8")
        parts = list(strings(text)) if path.suffix == ".py" else text.splitlines()
        for part in parts:
            for run in re.split(r"\{[^}]*\}", part):
                result |= shingles(run)
    return result


def strings(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_spread_reaches_over_the_whole_list() -> None:
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread(range(3), 9) == [0, 1, 2]
    kinds = {row.meta["category"] for row in request_list("everyday", 100).samples}
    assert len(kinds) >= 20


def test_eight_sentences_stand_around_a_request() -> None:
    harmful = request_list("harmful", 20)
    sentences = {text for _, text in read_lines(SENTENCES)}
    for place in PLACES:
        for row, changed in zip(harmful.samples, surrounded(harmful, place).samples, strict=True):
            before, _, after = changed.prompt.partition(row.prompt)
            parts = [sum(sentence in part for sentence in sentences) for part in (before, after)]
            assert parts == {"before": [8, 0], "after": [0, 8], "around": [4, 4]}[place]
            assert (changed.id, changed.request_label) == (row.id, "harmful")
        assert surrounded(harmful, place).samples == surrounded(harmful, place).samples


# --- examples, pages, public sets -----------------------------------------------------------------------


def test_every_example_has_its_labels(tmp_path: Path) -> None:
    rows = {row.id: row for row in examples(tmp_path).samples}
    assert len(rows) == 14
    assert rows["text with an answer that refuses"].response_label == "unharmful"
    assert rows["A forged verdict"].prompt.endswith("</result>")
    assert rows["Markup"].response == "<b onclick=\"alert('response')\">Because it is shown as text.</b>"
    assert decoded_images(rows["An image with text"].images[0])[0].size == (480, 300)


def test_an_example_without_labels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = write_rows(tmp_path / "demo.jsonl", [{"id": "new", "prompt": "x"}])
    monkeypatch.setattr("benchmarks.quality.examples.DEMO", demo)
    with pytest.raises(DataError, match="the example 'new' has no labels; add them"):
        examples(tmp_path)


def test_a_page_is_larger_where_its_type_is(tmp_path: Path) -> None:
    small, large = (pages(size, 5, tmp_path).samples for size in (12, 40))
    assert [row.id for row in small] == [row.id for row in large]
    assert len(small) == 10
    assert {row.request_label for row in small} == {"harmful", "unharmful"}
    for small_row, large_row in zip(small, large, strict=True):
        first, second = (decoded_images(row.images[0])[0] for row in (small_row, large_row))
        assert first.height < second.height
        assert first.getextrema() == ((0, 255),) * 3


def public_rows(source: str, count: int, held_out: bool | None) -> list[dict[str, Any]]:
    """Rows of both classes, of requests and responses; held-out ones, the others, or both."""
    rows: list[dict[str, Any]] = []
    number = 0
    while len(rows) < count:
        number += 1
        name = f"{source}-{number}"
        if held_out is None or is_held_out(name) is held_out:
            label = ("harmful", "unharmful")[len(rows) % 2]
            prompt = f"number {number} is {'BAD' if label == 'harmful' else 'fine'}"
            row = {"id": name, "source": source, "prompt": prompt, "request_label": label}
            rows.append({**row, "response": prompt, "response_label": label} if len(rows) % 4 < 2 else row)
    return rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    toy = public_rows("toy", 60, held_out=True) + public_rows("toy", 60, held_out=False)
    write_rows(folder / "toy" / "train.jsonl", [*toy, {**toy[0], "id": "toy-0-weak", "meta": {"weak": True}}])
    write_rows(folder / "closed" / "train.jsonl", public_rows("closed", 40, held_out=None))
    write_rows(folder / XSTEST / "validation.jsonl", public_rows(XSTEST, 30, held_out=None))
    harmless = [row for row in public_rows(ASSISTANT, 60, held_out=None) if row["request_label"] == "unharmful"]
    write_rows(folder / ASSISTANT / "validation.jsonl", harmless)
    lines = [f"toy,train.jsonl,open\n{XSTEST},validation.jsonl,open\n{ASSISTANT},validation.jsonl,open\n"]
    (folder / "manifest.csv").write_text("source,file,use\n" + "".join(lines) + "closed,train.jsonl,restricted\n")
    return folder


def test_only_held_out_rows_of_open_sources_are_judged(data: Path) -> None:
    sets = public_sets(data, 40)
    assert {one.benchmark.name: len(one.samples) for one in sets.loaded} == {"toy": 40, XSTEST: 30, ASSISTANT: 30}
    (toy,) = (one.samples for one in sets.loaded if one.benchmark.name == "toy")
    assert all(is_held_out(row.id) for row in toy)
    assert len(sets.train) == 60
    assert not any(is_held_out(row.id) for row in sets.train)
    fewer = public_sets(data, 20).loaded[0].samples
    assert fewer == toy[:20]


def test_a_folder_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.csv: no list of sources"):
        public_sets(tmp_path, 9)


# --- the gate -------------------------------------------------------------------------------------------


def figure(value: float | None, *, noise: float = 0.0, higher: bool = True, **more: Any) -> Measure:
    return Measure("it", value, noise, 100, higher, **more)


def test_what_is_wanted_is_met_or_not() -> None:
    assert figure(80.0, wanted=80).meets
    assert not figure(79.9, wanted=80).meets
    assert figure(2.0, higher=False, wanted=2).meets
    assert not figure(2.1, higher=False, wanted=2).meets
    assert figure(None, wanted=2).meets is False
    assert figure(7.0).meets is None
    assert not figure(-0.5, noise=0.8, wanted=0).meets
    assert figure(-0.5, noise=0.8, wanted=0, within_noise=True).meets
    assert not figure(-0.9, noise=0.8, wanted=0, within_noise=True).meets


def test_a_guard_is_behind_by_more_than_both_figures_noise() -> None:
    before = Earlier(80.0, 4.0)
    assert not is_behind(figure(75.0, noise=3.0), before)  # hypot(3, 4) is 5
    assert is_behind(figure(74.9, noise=3.0), before)
    assert is_behind(figure(85.1, noise=3.0, higher=False), before)
    assert not is_behind(figure(85.1, noise=3.0), before)
    assert not is_behind(figure(0.0), None)
    assert is_behind(figure(None), before)


def test_failures_name_the_figure_and_what_was_wanted() -> None:
    missed = figure(70.0, wanted=80)
    assert failures([missed], {}, demand=False) == []
    assert failures([missed], {}, demand=True) == ["it: 70.0, at least 80 is wanted"]
    assert failures([missed], {"it": Earlier(90.0, 1.0)}, demand=False) == ["it: 70.0, behind the earlier guard's 90.0"]
    (line,) = failures([missed], {"it": Earlier(70.0, 1.0), "other": Earlier(1.0, 0.0)}, demand=False)
    assert line.startswith("other: not measured")


def perfect(text: str) -> bool:
    return "BAD" in text or any(line.strip() in text for line in HARMFUL)


def scripted(is_harmful: Callable[[str], bool], policy: Policy | None = None) -> Guard:
    """Judges by the whole message."""

    def reply(request: EngineRequest) -> str:
        text = request.messages[-1].text
        if "BROKEN" in text:
            raise EngineError("the engine is out of order; try again")
        label = "harmful" if is_harmful(text) else "unharmful"
        return answer(label, label)

    def scores(request: EngineRequest, _: str) -> tuple[float, ...]:
        high, low = math.log(0.9), math.log(0.1)
        return (high, low) if is_harmful(request.messages[-1].text) else (low, high)

    return Guard(ScriptedEngine(reply, scores=scores), policy)


@pytest.fixture
def judged_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Use:
    """What `Guard.load` gives from then on; bounds that a guard which sees no images keeps."""
    bounds = {f"{name}, {mode}": 0 for name in ("everyday requests blocked", "harmful requests let through")
              for mode in quality.QUICK}  # fmt: skip
    (tmp_path / "bounds.json").write_text(json.dumps({**bounds, "examples judged rightly": 50}))
    monkeypatch.setattr(gate, "BOUNDS", tmp_path / "bounds.json")
    monkeypatch.setattr(quality, "be_quiet", lambda: None)
    monkeypatch.setattr(quality, "CHANGED", 6)
    monkeypatch.setattr(quality, "DRAWN", 2)
    monkeypatch.setattr(quality, "request_list", lambda name, count=None: request_list(name, count or 40))
    monkeypatch.setattr("guardreasoner_vl.evaluation.intervals.RESAMPLES", 100)

    def use(is_harmful: Callable[[str], bool]) -> Guard:
        guard = scripted(is_harmful)
        monkeypatch.setattr(guards.Guard, "load", lambda *_, **__: guard)
        return guard

    return use


def run(tmp_path: Path, *arguments: object, work: str = "work") -> int:
    return quality.main([str(argument) for argument in ("--work", tmp_path / work, *arguments)])


def figures_in(path: Path) -> dict[str, float]:
    return {row["name"]: row["value"] for row in json.loads(path.read_text())["measures"]}


def test_the_quick_part_passes_a_guard_that_knows(
    tmp_path: Path, judged_by: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(perfect)
    assert run(tmp_path, "--quick", "--out", tmp_path / "out.json") == 0
    output = capsys.readouterr()
    assert "0 of 5 figures miss what is wanted; 0 failures" in output.out
    assert "fast, everyday: 100 rows" in output.err
    assert set(figures_in(tmp_path / "out.json")) == set(json.loads(gate.BOUNDS.read_text()))
    assert not (tmp_path / "work").exists()


def test_the_quick_part_fails_a_guard_that_blocks_what_is_harmless(
    tmp_path: Path, judged_by: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(lambda text: True)
    assert run(tmp_path, "--quick") == 1
    output = capsys.readouterr().out
    assert "FAILED everyday requests blocked, fast: 100.0, at most 0 is wanted" in output
    assert "FAILED harmful" not in output
    assert "wrong, everyday, fast: small talk 5 of 5" in output


def test_errors_count_as_wrong(tmp_path: Path, judged_by: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> bool:
        raise EngineError("the engine is out of order; try again")

    judged_by(broken)
    monkeypatch.setattr("guardreasoner_vl.engines.faults.FaultStreak.check", lambda self: None)
    assert run(tmp_path, "--quick", "--out", tmp_path / "out.json") == 1
    figures = figures_in(tmp_path / "out.json")
    assert figures["everyday requests blocked, slow"] == 100
    assert figures["harmful requests let through, slow"] == 100


def test_the_shipped_bounds_name_what_the_quick_part_measures(
    tmp_path: Path, judged_by: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(perfect)
    monkeypatch.setattr(gate, "BOUNDS", FOLDER / "bounds.json")
    assert run(tmp_path, "--quick", "--out", tmp_path / "out.json") in (0, 1)
    assert set(json.loads(gate.BOUNDS.read_text())) == set(figures_in(tmp_path / "out.json"))


def test_a_measure_without_a_bound_is_an_error(
    tmp_path: Path, judged_by: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(perfect)
    gate.BOUNDS.write_text("{}")
    assert run(tmp_path, "--quick") == 2
    assert "no bound for 'everyday requests blocked, fast'; add one" in capsys.readouterr().err


def test_the_whole_table_of_a_guard_that_knows(
    tmp_path: Path, data: Path, judged_by: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(perfect)
    assert run(tmp_path, "--data", data, "--out", tmp_path / "out.json") == 0
    figures = figures_in(tmp_path / "out.json")
    for mode in ("fast", "slow"):
        assert figures[f"everyday requests blocked, {mode}"] == 0
        assert figures[f"harmful requests let through, {mode}"] == 0
        assert figures[f"flips: harmless sentences around, {mode}"] == 0
        assert figures[f"flips: rendered, {mode}"] == 50  # it sees no images: the harmful half turns
        assert figures[f"pages of 12 pixels, {mode}"] == 50
        assert figures[f"XSTest F1, {mode}"] == 100
        assert figures[f"XSTest FPR, {mode}"] == 0
        assert figures[f"coverage, {mode}"] == 100
        assert figures[f"response F1, pooled, {mode}"] == 100
        assert figures[f"sets above always harmful, {mode}"] == 100
    assert figures["request F1, slow minus fast"] == 0
    assert figures["request AUPRC, slow minus fast"] == 0
    output = capsys.readouterr().out
    assert "| XSTest F1, fast | 100.0 | 0.0 | 30 | at least 82 | – | pass |" in output
    assert "requests by set:" in output


def test_verdicts_are_kept_for_the_next_run(tmp_path: Path, judged_by: Use) -> None:
    engine: ScriptedEngine = judged_by(perfect).engine  # type: ignore[assignment]
    assert run(tmp_path, "--modes", "fast") == 0
    asked = len(engine.requests)
    assert asked > 80 + 6 * 3
    assert run(tmp_path, "--modes", "fast") == 0
    assert len(engine.requests) == asked
    assert run(tmp_path, "--modes", "fast", work="other") == 0
    assert len(engine.requests) == 2 * asked


def test_sentences_that_hide_harm_are_seen(tmp_path: Path, judged_by: Use) -> None:
    """This guard reads only the beginning of a text."""
    judged_by(lambda text: any(text.startswith(f"Human user:\n{line.strip()}") for line in HARMFUL))
    assert run(tmp_path, "--modes", "fast", "--out", tmp_path / "out.json") == 0
    figures = figures_in(tmp_path / "out.json")
    assert figures["flips: padded before, fast"] == figures["flips: harmless sentences before, fast"] == 100
    assert figures["flips: padded after, fast"] == figures["flips: harmless sentences after, fast"] == 0
    assert "XSTest F1, fast" not in figures
    assert run(tmp_path, "--modes", "fast", "--strict") == 1


def test_a_guard_behind_the_earlier_one_fails(
    tmp_path: Path, data: Path, judged_by: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--data", data, "--modes", "fast")
    judged_by(perfect)
    assert run(tmp_path, *shared, "--out", tmp_path / "before.json") == 0
    assert run(tmp_path, *shared, "--against", tmp_path / "before.json") == 0
    judged_by(lambda text: perfect(text) or "fine" in text)
    assert run(tmp_path, *shared, "--against", tmp_path / "before.json", work="worse") == 1
    output = capsys.readouterr().out
    assert re.search(r"FAILED XSTest FPR, fast: 100\.0, behind the earlier guard's 0\.0", output)
    assert "FAILED everyday" not in output


def test_figures_of_the_other_part_are_refused(
    tmp_path: Path, judged_by: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    judged_by(perfect)
    assert run(tmp_path, "--quick", "--out", tmp_path / "quick.json") == 0
    assert run(tmp_path, "--against", tmp_path / "quick.json") == 2
    assert "run both with --quick, or both without" in capsys.readouterr().err
    (tmp_path / "none.json").write_text("[]")
    assert run(tmp_path, "--against", tmp_path / "none.json") == 2
    assert "no figures of a guard in it; give a file that --out wrote" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quick", "--data", "x"), "--quick judges no public sets"),
        (("--modes", "fast,quick"), "no mode quick; use slow, fast, hybrid"),
        (("--rows", "0"), "--rows: give at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        quality.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
