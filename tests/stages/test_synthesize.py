"""Synthesis: every row ends as kept, skipped with a reason, or left; nothing answered is lost or asked twice."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.corpus.attempts import REASONING, Attempt, AttemptIndex, AttemptLog, read_attempts
from guardreasoner_vl.corpus.progress import pending
from guardreasoner_vl.corpus.store import CorpusInfo, read_corpus, write_corpus
from guardreasoner_vl.engines.openai import http as openai_http
from guardreasoner_vl.engines.openai.http import HttpError
from guardreasoner_vl.errors import DataError, GuardError, ImageError, InputError
from guardreasoner_vl.stages.synthesize import SynthesisReport, SynthesisStatus, run
from guardreasoner_vl.teachers.base import TeacherAnswer, Tokens
from guardreasoner_vl.teachers.budget import Budget, Price
from guardreasoner_vl.teachers.offline import RulesTeacher
from guardreasoner_vl.teachers.openai import OpenAITeacher
from guardreasoner_vl.types import Sample
from tests.made_images import image
from tests.teachers.teacher_server import STEPS, Reply, TeacherServer, answer, truthful, user_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Said = str | BaseException
USUAL = Tokens(100, 20)


def row(name: str, **fields: Any) -> Sample:
    """A row whose prompt says its name, so that a server knows it."""
    content = {"prompt": f"bread [{name}]", "request_label": "unharmful", "modality": "text", "source": "toy", **fields}
    return Sample.model_validate({"id": name, **content})


def corpus(folder: Path, *rows: Sample, embed: bool = False) -> Path:
    write_corpus(folder, CorpusInfo(name="toy"), rows, embed=embed)
    return folder


def many(folder: Path, count: int, **fields: Any) -> Path:
    return corpus(folder, *(row(f"r{number}", **fields) for number in range(count)))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / REASONING).read_bytes().splitlines()]


def says(sample: Sample) -> str:
    return answer(sample.request_label or "None", sample.response_label or "None")


@dataclass
class Scripted:
    """Says what `brain` says about a row, its complaint and how often it was asked; by default the truth."""

    brain: Callable[[Sample, str | None, int], Said] = lambda sample, complaint, times: says(sample)
    labels: Callable[[Sample, int], Said] = lambda sample, times: answer()
    name: str = "scripted"
    takes: Tokens = USUAL
    most: Tokens = USUAL
    pause: float = 0.0
    asked: Counter[str] = field(default_factory=Counter)
    labelled: Counter[str] = field(default_factory=Counter)
    complaints: list[tuple[str, str | None]] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    closed: int = 0

    def estimate(self, sample: Sample) -> Tokens:
        return self.most

    async def write(self, sample: Sample, complaint: str | None) -> TeacherAnswer:
        self.asked[sample.id] += 1
        self.complaints.append((sample.id, complaint))
        return await self._said(self.brain(sample, complaint, self.asked[sample.id]))

    async def label(self, sample: Sample) -> TeacherAnswer:
        self.labelled[sample.id] += 1
        return await self._said(self.labels(sample, self.labelled[sample.id]))

    async def aclose(self) -> None:
        self.closed += 1

    async def _said(self, said: Said) -> TeacherAnswer:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.pause)
        finally:
            self.in_flight -= 1
        if isinstance(said, BaseException):
            raise said
        return TeacherAnswer(said, "stop", self.takes.prompt, self.takes.completion)


def named(payload: dict[str, Any]) -> str:
    """The row that a request is about."""
    return user_of(payload).partition("[")[2].partition("]")[0]


def counts(report: SynthesisReport) -> tuple[int, int, int, int]:
    assert report.rows == report.kept + report.skipped.total + report.remaining
    return report.rows, report.kept, report.skipped.total, report.remaining


# --- what is asked and kept -----------------------------------------------------------------------------


def test_every_row_gets_its_reasoning(tmp_path: Path) -> None:
    folder = corpus(
        tmp_path,
        row("a"),
        row("b", request_label="harmful", response="Mix.", response_label="unharmful"),
        row("own", reasoning="my own words"),
        row("partly", response="Mix.", request_label=None, response_label="harmful"),
    )
    teacher = Scripted(lambda sample, *_: answer(sample.request_label or "harmful", sample.response_label or "None"))
    report = run(folder, teacher)
    assert counts(report) == (4, 4, 0, 0)
    assert (report.attempts, report.asked, report.tokens, report.cost, report.stopped_by) == (3, 3, 360, None, None)
    assert teacher.asked == {"a": 1, "b": 1, "partly": 1}
    assert teacher.closed == 1
    rows = {sample.id: sample for sample in read_corpus(folder)}
    assert [rows[name].reasoning for name in ("a", "b", "own")] == [STEPS, STEPS, "my own words"]
    assert rows["a"].meta == {"teacher": "scripted"}
    # What nobody labelled stays unlabelled; what the teacher took it for is told.
    assert (rows["partly"].request_label, rows["partly"].meta["judged"]) == (None, {"request": "harmful"})
    # One more run has nothing to do.
    again = run(folder, teacher)
    assert (again.asked, again.kept, again.of_others, again.attempts) == (0, 4, 0, 3)
    # Nor has another teacher: the row that came with reasoning has it of no teacher.
    other = run(folder, Scripted(name="other"))
    assert (other.asked, other.kept, other.of_others) == (0, 4, 3)
    assert len(lines(folder)) == 3


def test_a_rejected_answer_is_asked_for_again_with_the_reason_then_skipped(tmp_path: Path) -> None:
    messages: dict[str, list[str]] = {
        "second": ["I'm sorry, I can't.", says(row("x"))],
        "never": ["", answer("harmful"), "I'm sorry, I can't.", says(row("x"))],
    }
    teacher = Scripted(lambda sample, _, times: messages[sample.id][times - 1])
    folder = corpus(tmp_path, row("second"), row("never"))
    report = run(folder, teacher)
    assert counts(report) == (2, 1, 1, 0)
    assert report.skipped.reasons == {"refusal": 1}
    assert report.skipped.rows == [("never", "refusal")]
    assert teacher.asked == {"second": 2, "never": 3}
    assert ("second", "refusal") in teacher.complaints
    assert [complaint for name, complaint in teacher.complaints if name == "never"] == [
        None,
        "empty",
        "contradicts the truth",
    ]
    never = [line for line in lines(folder) if line["id"] == "never"]
    assert [(line["reason"], line.get("final", False)) for line in never] == [
        ("empty", False),
        ("contradicts the truth", False),
        ("refusal", True),
    ]
    # Skipped for good.
    assert run(folder, teacher).asked == 0


def test_the_rules_teacher_needs_no_endpoint(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"), row("b", request_label="harmful"), row("c", request_label=None))
    report = run(folder, RulesTeacher(), budget=Budget(usd=0.0, tokens=0))
    assert counts(report) == (3, 2, 0, 1)
    assert (report.cost, report.tokens, report.stopped_by) == (0.0, 0, None)
    # It cannot label, but another teacher can.
    assert report.faults.rows == [("c", "teacher: cannot_label")]
    report = run(folder, Scripted())
    assert counts(report) == (3, 3, 0, 0)
    assert {line["teacher"] for line in lines(folder)} == {"rules", "scripted"}


def test_images_inside_the_rows_reach_the_teacher(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(image(40, 30).png)
    shown = row("shown", modality="image", prompt="", images=(str(path),))
    broken = tmp_path / "broken.png"
    broken.write_bytes(image(40, 30).png[:50])
    bad = row("broken", modality="image", images=(str(broken),))
    folder = corpus(tmp_path / "corpus", shown, bad, embed=True)
    with TeacherServer() as server:
        report = run(folder, OpenAITeacher(base_url=server.url))
    # An image that cannot be sent never can be: no fault of the endpoint.
    assert report.skipped.rows == [("broken", f"teacher: {ImageError.code}")]
    assert counts(report) == (2, 1, 1, 0)
    (payload,) = server.payloads
    assert payload["messages"][1]["content"][1]["type"] == "image_url"


# --- rows without any label -----------------------------------------------------------------------------


def unlabelled(name: str, **fields: Any) -> Sample:
    return row(name, request_label=None, **fields)


def test_labels_by_majority(tmp_path: Path) -> None:
    votes = {
        "clear": [answer("harmful"), answer("harmful"), answer("harmful")],
        "close": [answer("harmful"), answer("unharmful"), answer("harmful")],
        "lost": ["what?", answer("harmful"), answer("harmful")],
        "open": ["what?", answer("harmful"), answer("unharmful")],
        "odd": ["what?", "", answer("harmful")],
        "both": [answer("harmful", "unharmful"), answer("unharmful", "unharmful"), answer("harmful", "unharmful")],
        "half": [answer("harmful", "harmful"), answer("harmful", "unharmful"), answer("harmful", "None")],
    }
    rows = [unlabelled(name, response="Mix." if name in ("both", "half") else None) for name in votes]
    teacher = Scripted(labels=lambda sample, times: votes[sample.id][times - 1])
    folder = corpus(tmp_path, *rows, row("has one"))
    report = run(folder, teacher)
    assert report.skipped.reasons == {"no majority": 3}
    assert {name for name, _ in report.skipped.rows} == {"open", "odd", "half"}
    assert counts(report) == (8, 5, 3, 0)
    assert set(teacher.labelled.values()) == {3}
    labels = {sample.id: sample for sample in read_corpus(folder)}
    assert {name: (labels[name].request_label, labels[name].response_label) for name in votes} == {
        "clear": ("harmful", None),
        "close": ("harmful", None),
        "lost": ("harmful", None),
        "both": ("harmful", "unharmful"),
        **dict.fromkeys(("open", "odd", "half"), (None, None)),
    }
    assert labels["close"].meta["votes"] == {"request": 2}
    assert labels["both"].meta["votes"] == {"request": 2, "response": 3}
    assert labels["clear"].reasoning == STEPS
    # The trace was asked for with the labels found, and nothing was asked about the others.
    assert set(teacher.asked) == {"clear", "close", "lost", "both", "has one"}
    assert len(lines(folder)) == 7 * 3 + 5 + 3


def test_an_even_number_of_votes_needs_more_than_half(tmp_path: Path) -> None:
    teacher = Scripted(labels=lambda _, times: answer("harmful" if times <= 2 else "unharmful"))
    assert run(corpus(tmp_path, unlabelled("a")), teacher, votes=4).skipped.reasons == {"no majority": 1}


def test_votes_that_are_stored_are_not_asked_for_again(tmp_path: Path) -> None:
    folder = corpus(tmp_path, unlabelled("a"))
    teacher = Scripted(labels=lambda _, times: answer("harmful") if times != 3 else HttpError("slow", "timeout"))
    report = run(folder, teacher)
    assert report.faults.rows == [("a", "teacher: timeout")]
    assert counts(report) == (1, 0, 0, 1)
    assert counts(run(folder, teacher)) == (1, 1, 0, 0)
    assert teacher.labelled == {"a": 4}


def test_a_row_with_nothing_to_judge_costs_nothing(tmp_path: Path) -> None:
    teacher = Scripted()
    report = run(corpus(tmp_path, row("a", prompt=" ")), teacher)
    assert report.skipped.reasons == {"nothing to judge": 1}
    assert not teacher.asked


# --- faults ---------------------------------------------------------------------------------------------


def test_a_fault_is_no_last_word(tmp_path: Path) -> None:
    faults: dict[str, GuardError] = {
        "slow": HttpError("no answer", "timeout"),
        "busy": HttpError("HTTP 429", status=429),
        "odd": HttpError("malformed", "malformed"),
        "gone": HttpError("cannot reach"),
    }
    folder = corpus(tmp_path, row("fine"), *map(row, faults))
    report = run(folder, Scripted(lambda sample, *_: faults.get(sample.id) or says(sample)))
    assert counts(report) == (5, 1, 0, 4)
    assert report.faults.reasons == {
        "teacher: timeout": 1,
        "teacher: http 429": 1,
        "teacher: malformed": 1,
        "teacher: engine": 1,
    }
    assert report.stopped_by is None
    assert len(lines(folder)) == 5
    healed = Scripted()
    report = run(folder, healed)
    assert counts(report) == (5, 5, 0, 0)
    assert report.faults.total == 0
    assert set(healed.asked) == set(faults)


def test_a_refused_key_stops_the_job_with_its_own_line(tmp_path: Path) -> None:
    folder = many(tmp_path, 200)

    def brain(sample: Sample, *_: object) -> Said:
        if sample.id == "r20":
            return HttpError("the server refused the API key: set OPENAI_API_KEY", "auth", 401)
        return says(sample)

    teacher = Scripted(brain)
    with pytest.raises(HttpError, match="refused the API key"):
        run(folder, teacher, concurrency=4)
    assert teacher.closed == 1
    stored = lines(folder)
    assert [line["id"] for line in stored if line.get("reason") == "teacher: auth"] == ["r20"]
    assert 15 <= len(stored) < 60
    assert counts(run(folder, Scripted())) == (200, 200, 0, 0)


def test_a_teacher_that_dies_half_way_is_left_alone(tmp_path: Path) -> None:
    folder = many(tmp_path, 400)
    teacher = Scripted()
    teacher.brain = lambda sample, *_: says(sample) if teacher.asked.total() <= 100 else HttpError("cannot reach it")
    report = run(folder, teacher, concurrency=8)
    assert report.stopped_by == "faults"
    assert counts(report) == (400, 100, 0, 300)
    # Twice as many faults as are read at once, and those in flight.
    assert 128 <= report.faults.total <= 140
    assert counts(run(folder, Scripted())) == (400, 400, 0, 0)


def test_a_fault_now_and_then_does_not_stop_the_job(tmp_path: Path) -> None:
    teacher = Scripted()
    teacher.brain = lambda sample, *_: says(sample) if teacher.asked.total() % 50 == 0 else HttpError("cannot reach it")
    report = run(many(tmp_path, 400), teacher, concurrency=1)
    assert report.stopped_by is None
    assert counts(report) == (400, 8, 0, 392)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reply", "reason", "fault", "asked"),
    [
        (Reply("I'm sorry, but I can't help with that."), "refusal", None, 3),
        (Reply('{"request": "unharmful"}'), "unparsable: missing_think", None, 3),
        (Reply(answer("harmful")), "contradicts the truth", None, 3),
        (Reply(answer(steps="## Reasoning Step 1\n" + "bread and " * 40)), "loop", None, 3),
        (Reply(""), "empty", None, 3),
        (Reply(answer()[:40], finish_reason="length"), "unparsable: truncated", None, 3),
        (Reply(status=429), None, "teacher: http 429", 2),
        (Reply(status=500), None, "teacher: http 500", 2),
        (Reply(body=b"<html>"), None, "teacher: malformed", 1),
    ],
)
def test_every_bad_teacher_is_counted_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, reason: str | None, fault: str | None, asked: int
) -> None:
    monkeypatch.setattr(openai_http, "BACKOFF_SECONDS", 0.001)
    folder = many(tmp_path, 12)

    def brain(payload: dict[str, Any]) -> Reply:
        return reply if int(named(payload)[1:]) % 3 == 0 else truthful(payload)

    with TeacherServer(brain) as server:
        report = run(folder, OpenAITeacher(base_url=server.url, retries=1))
        assert counts(report) == (12, 8, 4 if reason else 0, 4 if fault else 0)
        assert report.skipped.reasons == ({reason: 4} if reason else {})
        assert report.faults.reasons == ({fault: 4} if fault else {})
        # Rejected three times, or tried again inside the client.
        assert len(server.payloads) == 8 + 4 * asked
        server.brain = truthful
        report = run(folder, OpenAITeacher(base_url=server.url))
        assert counts(report) == (12, 12, 0, 0) if fault else (12, 8, 4, 0)
    assert {sample.id for sample in read_corpus(folder) if sample.reasoning} >= {f"r{n}" for n in range(12) if n % 3}


# --- budget ---------------------------------------------------------------------------------------------


def test_the_job_stops_before_the_budget_is_exceeded_and_counts_what_was_spent(tmp_path: Path) -> None:
    folder = many(tmp_path, 20)
    teacher = Scripted(pause=0.001)
    report = run(folder, teacher, budget=Budget(tokens=1_000), concurrency=8)
    # Each answer takes 120.
    assert (report.tokens, report.stopped_by) == (960, "budget")
    assert counts(report) == (20, 8, 0, 12)
    report = run(folder, teacher, budget=Budget(tokens=1_199))
    assert (report.tokens, report.asked, report.remaining) == (1_080, 1, 11)
    # What an answer took counts, not what it might have taken.
    report = run(folder, Scripted(most=Tokens(400, 400)), budget=Budget(tokens=2_400), concurrency=8)
    assert (report.tokens, report.asked, report.remaining) == (1_680, 5, 6)
    assert run(folder, teacher).remaining == 0


def test_a_budget_of_money(tmp_path: Path) -> None:
    folder = many(tmp_path, 10)
    # 100 tokens in and 20 out at these prices: 0.10 + 0.04 USD.
    price = Price(1_000, 2_000)
    report = run(folder, Scripted(), budget=Budget(usd=0.5), price=price)
    assert report.cost == pytest.approx(0.42)
    assert (report.kept, report.stopped_by) == (3, "budget")
    with pytest.raises(InputError, match="no price is known for 'scripted'"):
        run(folder, Scripted(), budget=Budget(usd=0.5))
    # Lines keep their price: at another one only what comes next costs more. 0.42 + 4 x 0.56.
    report = run(folder, Scripted(), budget=Budget(usd=2.7), price=Price(4_000, 8_000))
    assert report.cost == pytest.approx(0.42 + 4 * 0.56)
    assert report.kept == 7


def test_lines_without_a_price_cost_today_s(tmp_path: Path) -> None:
    folder = many(tmp_path, 4)
    assert run(folder, Scripted(), budget=Budget(tokens=240)).cost is None
    assert run(folder, Scripted(), budget=Budget(tokens=240), price=Price(1_000, 2_000)).cost == pytest.approx(0.28)


def test_rejected_answers_are_paid_for_too(tmp_path: Path) -> None:
    report = run(many(tmp_path, 1), Scripted(lambda *_: "no", takes=Tokens(7, 3)))
    assert (report.tokens, report.attempts) == (30, 3)


# --- stops and resumes ----------------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from guardreasoner_vl.stages.synthesize import run
from guardreasoner_vl.teachers.openai import OpenAITeacher
run(Path(sys.argv[1]), OpenAITeacher(base_url=sys.argv[2]), concurrency=4)
"""


@pytest.mark.slow
def test_a_killed_job_resumes_and_asks_nothing_twice(tmp_path: Path) -> None:
    folder = many(tmp_path, 60)

    def brain(payload: dict[str, Any]) -> Reply:
        time.sleep(0.02)
        return truthful(payload)

    with TeacherServer(brain) as server:
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), server.url])
        log = folder / REASONING
        while not log.is_file() or log.read_bytes().count(b"\n") < 12:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        stored = {attempt.id for attempt in read_attempts(log)}
        assert 12 <= len(stored) < 60
        with log.open("ab") as stream:
            stream.write(b'{"id": "r59", "reasoning": "torn in the mid')
        server.payloads.clear()
        report = run(folder, OpenAITeacher(base_url=server.url), concurrency=4)
    assert counts(report) == (60, 60, 0, 0)
    assert sorted(line["id"] for line in lines(folder)) == sorted(f"r{number}" for number in range(60))
    assert sorted(map(named, server.payloads)) == sorted({f"r{number}" for number in range(60)} - stored)


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """A shell starts what runs in its background deaf to Ctrl+C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_leaves_everything_answered_on_the_disk(tmp_path: Path) -> None:
    folder = many(tmp_path, 50)
    teacher = Scripted(pause=0.001)

    def brain(sample: Sample, *_: object) -> Said:
        if sample.id == "r30":
            signal.raise_signal(signal.SIGINT)
        return says(sample)

    teacher.brain = brain
    with pytest.raises(KeyboardInterrupt):
        run(folder, teacher, concurrency=4)
    assert teacher.closed == 1
    stored = {line["id"] for line in lines(folder)}
    assert 20 <= len(stored) <= 31
    healed = Scripted()
    assert counts(run(folder, healed)) == (50, 50, 0, 0)
    assert set(healed.asked) == {f"r{number}" for number in range(50)} - stored


def test_a_bug_in_a_teacher_is_raised_and_loses_nothing(tmp_path: Path) -> None:
    folder = many(tmp_path, 30)
    with pytest.raises(ZeroDivisionError):
        run(folder, Scripted(lambda s, *_: ZeroDivisionError() if s.id == "r9" else says(s)), concurrency=1)
    assert len(lines(folder)) == 9


def test_rejections_of_earlier_runs_count(tmp_path: Path) -> None:
    folder = corpus(tmp_path, row("a"))
    with AttemptLog(folder / REASONING) as log:
        log.add(Attempt(id="a", reason="empty", teacher="t"))
        log.add(Attempt(id="a", reason="teacher: timeout", teacher="t"))
        log.add(Attempt(id="a", reason="loop", teacher="t"))
    teacher = Scripted(lambda *_: "")
    assert run(folder, teacher).skipped.reasons == {"empty": 1}
    assert teacher.complaints == [("a", "loop")]


def test_a_corpus_belongs_to_one_job_at_a_time(tmp_path: Path) -> None:
    folder = many(tmp_path, 2)
    teacher = Scripted()
    with AttemptLog(folder / REASONING), pytest.raises(DataError, match="another `synthesize` is writing it"):
        run(folder, teacher)
    assert not teacher.asked


# --- the job itself -------------------------------------------------------------------------------------


def test_no_more_than_the_given_number_are_in_flight(tmp_path: Path) -> None:
    for concurrency in (1, 7):
        teacher = Scripted(pause=0.001)
        run(many(tmp_path / str(concurrency), 60), teacher, concurrency=concurrency)
        assert teacher.most_in_flight == concurrency


@pytest.mark.slow
def test_rows_are_read_as_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_out = 0

    def watched(*arguments: Any) -> Any:
        nonlocal handed_out
        for sample in pending(*arguments):
            handed_out += 1
            yield sample

    monkeypatch.setattr("guardreasoner_vl.stages.synthesize.pending", watched)
    ahead: list[int] = []
    teacher = Scripted(pause=0.0001)

    def brain(sample: Sample, *_: object) -> Said:
        ahead.append(handed_out - teacher.asked.total())
        return says(sample)

    teacher.brain = brain
    run(many(tmp_path, 2_000), teacher, concurrency=4)
    assert max(ahead) <= 2 * 64 + 2 * 4 + 4


def test_progress_shows_cost_and_remaining_time(tmp_path: Path) -> None:
    updates: list[SynthesisStatus] = []
    folder = many(tmp_path, 10)
    price = Price(1_000, 2_000)
    run(folder, Scripted(), budget=Budget(tokens=480), price=price)
    teacher = Scripted(lambda sample, *_: "" if sample.id == "r9" else says(sample), pause=0.01)
    report = run(folder, teacher, price=price, progress=updates.append, concurrency=1)
    assert [now.done for now in updates] == [5, 6, 7, 8, 9, 10]
    assert {now.total for now in updates} == {10}
    assert (updates[-1].kept, updates[-1].skipped) == (9, 1)
    assert [now.tokens for now in updates] == [600, 720, 840, 960, 1_080, 1_440]
    assert updates[0].cost == pytest.approx(0.7)
    assert updates[-1].cost == pytest.approx(report.cost)
    assert updates[0].seconds_left is not None
    assert 0.04 < updates[0].seconds_left < 5
    assert updates[-1].seconds_left == 0


def test_duplicate_ids_are_reported(tmp_path: Path) -> None:
    teacher = Scripted()
    report = run(corpus(tmp_path, row("a"), row("b"), row("a")), teacher)
    assert teacher.asked == {"a": 1, "b": 1}
    assert counts(report) == (3, 2, 1, 0)
    assert report.skipped.rows == [("a", "repeated id")]


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    folder = many(tmp_path, 1)
    for settings in ({"attempts": 0}, {"votes": 0}, {"concurrency": 0}):
        with pytest.raises(InputError, match="1 or more"):
            run(folder, Scripted(), **settings)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="curate --out"):
        run(tmp_path / "none", Scripted())
    (folder / "rows.parquet").write_bytes(b"cake")
    with pytest.raises(DataError, match="not rows of samples"):
        run(folder, Scripted())


def test_an_empty_corpus(tmp_path: Path) -> None:
    assert counts(run(corpus(tmp_path), Scripted())) == (0, 0, 0, 0)


# --- the file of attempts -------------------------------------------------------------------------------


def test_a_torn_line_is_cut_off_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / REASONING
    first, second = Attempt(id="a", reason="loop", teacher="t"), Attempt(id="b", reasoning="\u2028x\n", teacher="t")
    whole = first.model_dump_json().encode() + b"\n"
    for torn, kept in (
        (b"", [first, second]),
        (b'{"id":', [first, second]),
        (b"\xff" * 200_000, [first, second]),
        (first.model_dump_json().encode(), [first, first, second]),
    ):
        path.write_bytes(whole + torn)
        with AttemptLog(path) as log:
            log.add(second)
        assert list(read_attempts(path)) == kept
    path.write_bytes(b'{"id": "a", "teac')
    with AttemptLog(path):
        pass
    assert path.read_bytes() == b""


def test_a_foreign_line_is_reported_and_kept(tmp_path: Path) -> None:
    folder = many(tmp_path, 1)
    (folder / REASONING).write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="line 1: not an attempt"):
        run(folder, Scripted())
    assert (folder / REASONING).read_text() == '{"id": "a"}\n'


def test_what_attempts_come_to(tmp_path: Path) -> None:
    path = tmp_path / REASONING
    with AttemptLog(path) as log:
        log.add(Attempt(id="a", reason="loop", teacher="t", prompt_tokens=5, completion_tokens=1, cost=0.5))
        log.add(Attempt(id="a", reason="teacher: timeout", teacher="t", custom_id="1"))
        log.add(Attempt(id="b", asked="label", request_label="harmful", teacher="t", prompt_tokens=2, custom_id="2"))
    index = AttemptIndex.read(path)
    assert (index.attempts, index.tokens, index.cost, index.unpriced) == (3, Tokens(7, 1), 0.5, Tokens(2, 0))
    assert index.answered == {"2"}
    assert (index.rows["a"].rejections, index.rows["a"].complaint, index.rows["a"].fault) == (
        1,
        "loop",
        "teacher: timeout",
    )
    assert index.rows["b"].votes == [{"request": "harmful"}]
    assert not index.rows["a"].done
