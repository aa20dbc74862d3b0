"""Hard-sample mining (paper, section 3.3; method, section 4): the rows of a corpus that the guard gets wrong.

    rows of the split train -> k answers each -> right or wrong (`rl.candidates`) -> the kept rows as a corpus

OUT/candidates.jsonl       one line for each judged row, on the disk before the next chunk is asked about
OUT/mining_settings.json   what the candidates depend on; a run with other settings is refused
OUT/mining.json, pass_rates.svg
OUT/rows.parquet, corpus.json, set_aside.jsonl

A run that stopped goes on where it was. A row whose answers did not all come has failed: the next run asks again.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.batch_output import sync, write_whole
from guardreasoner_vl.corpus.standing import REPEATED, TRAIN
from guardreasoner_vl.corpus.store import SET_ASIDE, CorpusInfo, is_corpus, read_corpus, read_info, write_corpus
from guardreasoner_vl.errors import DataError, EngineError, ImageError, InputError, InputTooLongError
from guardreasoner_vl.evaluation.figures import OTHER, OWN, THIRD, new_axes, svg_of
from guardreasoner_vl.rl.candidates import PassRates, candidate_requests, is_kept, judged, read_candidates
from guardreasoner_vl.run_dir import changed_keys, write_json
from guardreasoner_vl.sources.set_aside import SetAside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guardreasoner_vl.engines.base import Engine, EngineRequest, EngineResult
    from guardreasoner_vl.recipe import MineSection, Recipe
    from guardreasoner_vl.rl.candidates import Candidates
    from guardreasoner_vl.types import Sample

CANDIDATES, SETTINGS = "candidates.jsonl", "mining_settings.json"
REPORT, FIGURE = "mining.json", "pass_rates.svg"
CHUNK = 64

FAULTS_IN_A_ROW = 64
"""This many rows without an answer, and none with one between them: the engine is gone, the run stops."""

_OWN_FAULTS = {InputError.code, ImageError.code, InputTooLongError.code}  # the row's, not the engine's
_MOST_BARS = 40


@dataclass(frozen=True)
class MiningReport:
    """What became of a corpus: of its `rows` (split train) `drawn` were to be asked about, `judged` + `failed`.

    `right[n]` counts the judged rows with n right candidates, `sources` the same for each source. `coverage` is the
    share of candidates inside the grammar, `tokens_mean` their mean completion tokens; None if no row was judged.
    """

    rows: int
    drawn: int
    judged: int
    kept: int
    failed: SetAside
    set_aside: SetAside
    coverage: float | None
    tokens_mean: float | None
    right: tuple[int, ...]
    sources: dict[str, tuple[int, ...]]

    def as_json(self) -> dict[str, Any]:
        """Plain data; which rows failed or were set aside is left out."""
        return {**asdict(self), "failed": self.failed.reasons, "set_aside": self.set_aside.reasons}


def run(
    recipe: Recipe,
    corpus: Path,
    engine: Engine,
    out: Path,
    *,
    chunk: int = CHUNK,
    progress: Callable[[int, int], None] | None = None,
) -> MiningReport:
    """Ask about every drawn row that `out` holds no candidates of, `chunk` rows at once, and write the kept ones.

    While nothing is kept, `mine.keep` may change in the same `out`. Raises `DataError` if `corpus` has no row to ask
    about, `out` belongs to something else, or no row is kept, and `EngineError` if the engine is gone.
    """
    if chunk < 1:
        raise InputError("chunk is a number of rows: give at least 1")
    info, section, log = read_info(corpus), recipe.mine, out / CANDIDATES
    survey = _survey(corpus, section.limit, recipe.seed)
    if not survey.drawn:
        raise DataError(f"{corpus}: no labelled row of the split train; give a corpus that has some")
    settings = {
        "mine": section.model_dump(mode="json"),
        "seed": recipe.seed,
        "model": {"name": engine.model.name, "revision": engine.model.revision},
        "corpus": {"name": info.name, "digest": survey.digest},
    }
    _check_same(out, settings)
    todo = survey.drawn - _finished(log, survey.drawn)
    asking = _Asking(engine, section, recipe.seed)
    done, rows = len(survey.drawn) - len(todo), _rows_of(corpus, todo)
    with log.open("ab") as stream:
        while batch := list(islice(rows, chunk)):
            found = asking.judged(batch)
            stream.writelines(one.model_dump_json().encode() + b"\n" for one in found)
            sync(stream)
            asking.check()
            done += len(batch)
            if progress:
                progress(done, len(survey.drawn))
    report, kept = _summary(log, section, survey, asking.failed)
    _write_report(out, report)
    if kept:
        mined = CorpusInfo(name=recipe.name, seed=recipe.seed, sources=info.sources)
        write_corpus(out, mined, _rows_of(corpus, kept))
    if report.judged:
        (out / FIGURE).write_text(pass_rates(report), "utf-8")
    if not kept:
        raise DataError(f"{out}: {_why_nothing(report, section, asking.last_fault)}")
    return report


@dataclass
class _Survey:
    """The training rows of a corpus: how many, which are asked about, which cannot be; `digest` tells corpora apart."""

    drawn: set[str]
    rows: int
    set_aside: SetAside
    digest: str


def _survey(corpus: Path, limit: int | None, seed: int) -> _Survey:
    digest, set_aside, seen, usable = hashlib.sha256(), SetAside(), set[str](), list[str]()
    rows = 0
    for sample in read_corpus(corpus):
        if sample.split != TRAIN:
            continue
        rows += 1
        labels = [sample.request_label, sample.response_label]
        names = [Path(image).name for image in sample.images]  # their folder may move
        digest.update(json.dumps([sample.id, sample.prompt, sample.response, *labels, names]).encode() + b"\n")
        if reason := REPEATED if sample.id in seen else _unusable(sample):
            set_aside.add(reason, sample.id)
        else:
            usable.append(sample.id)
        seen.add(sample.id)
    if limit is not None and limit < len(usable):
        usable = random.Random(f"{seed}-mine").sample(usable, limit)
    return _Survey(set(usable), rows, set_aside, digest.hexdigest())


def _unusable(sample: Sample) -> str | None:
    """Why no answer about the row could be called right or wrong; a label of what is not there does not count."""
    try:
        exchange = sample.exchange()
    except InputError:
        return "nothing to judge"
    known = (exchange.has_prompt and sample.request_label) or (exchange.has_response and sample.response_label)
    return None if known else "no label"


def _check_same(out: Path, settings: dict[str, Any]) -> None:
    """The candidates do not depend on the rule, so that it may change until a corpus was made by it."""
    path = out / SETTINGS
    if path.is_file():
        changed = changed_keys(json.loads(path.read_text("utf-8")), settings)
        changed = [key for key in changed if key != "mine.keep" or is_corpus(out)]
        if changed:
            raise DataError(f"{out} holds a mining with another {', '.join(changed)}; give a new --out")
    elif is_corpus(out):
        raise DataError(f"{out} holds a corpus that is no mining's; give a new --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def _finished(log: Path, drawn: set[str]) -> set[str]:
    """The rows judged already; a line torn by a kill is cut off."""
    if not log.is_file():
        return set()
    with log.open("r+b") as stream:
        stream.truncate(sum(len(line) for line in stream if line.endswith(b"\n")))
    found = {one.id for one in read_candidates(log)}
    if strange := len(found - drawn):
        raise DataError(f"{log} holds candidates of {strange:,} rows that are not asked for; give a new --out")
    return found


def _rows_of(corpus: Path, ids: set[str]) -> Iterator[Sample]:
    """Stream the training rows with these ids, the first of those with the same one."""
    left = set(ids)
    for sample in read_corpus(corpus):
        if sample.split == TRAIN and sample.id in left:
            left.remove(sample.id)
            yield sample


@dataclass
class _Asking:
    """Asks the engine, and counts the rows that got no answer."""

    engine: Engine
    section: MineSection
    seed: int
    failed: SetAside = field(default_factory=SetAside)
    last_fault: str = ""
    in_a_row: int = 0

    def judged(self, samples: Sequence[Sample]) -> list[Candidates]:
        """The rows whose answers all came; the candidates of a row stand side by side in one call."""
        asked = [(sample, requests) for sample in samples if (requests := self._requests(sample))]
        every = [request for _, requests in asked for request in requests]
        results = self.engine.generate(every) if every else []
        if len(results) != len(every):
            raise EngineError(f"the engine gave {len(results)} results for {len(every)} requests; use another one")
        left = iter(results)
        answers = [(sample, list(islice(left, len(requests)))) for sample, requests in asked]
        return [judged(sample, own) for sample, own in answers if self._came(sample, own)]

    def check(self) -> None:
        """Raises `EngineError` if no other row can be expected to fare better."""
        if self.in_a_row >= FAULTS_IN_A_ROW:
            raise EngineError(
                f"{self.in_a_row} rows one after another got no answer ({self.last_fault}); "
                "mend the engine and mine again, what was judged stays"
            )

    def _requests(self, sample: Sample) -> list[EngineRequest]:
        """What is asked about a row; nothing if its pictures cannot be read."""
        try:
            return candidate_requests(sample, self.section, self.seed)
        except InputError as error:
            self._fail(sample, error.code, str(error))
            return []

    def _came(self, sample: Sample, answers: Sequence[EngineResult]) -> bool:
        fault = next((answer for answer in answers if answer.finish_reason == "error"), None)
        if fault is None:
            self.in_a_row = 0
            return True
        self._fail(sample, fault.error_code, fault.error or "")
        return False

    def _fail(self, sample: Sample, code: str, message: str) -> None:
        self.failed.add(code, sample.id)
        if code in _OWN_FAULTS:
            self.last_fault = self.last_fault or message
        else:
            self.in_a_row, self.last_fault = self.in_a_row + 1, message


def _summary(log: Path, section: MineSection, survey: _Survey, failed: SetAside) -> tuple[MiningReport, set[str]]:
    """The figures of all judged rows, and the ids of those kept."""
    kept: set[str] = set()
    rates, count = PassRates(), section.candidates
    for one in read_candidates(log):
        rates.add(one)
        if is_kept(one.right, section.keep):
            kept.add(one.id)
    report = MiningReport(
        rows=survey.rows,
        drawn=len(survey.drawn),
        judged=sum(rates.of_all(count)),
        kept=len(kept),
        failed=failed,
        set_aside=survey.set_aside,
        coverage=rates.coverage,
        tokens_mean=rates.tokens_mean,
        right=rates.of_all(count),
        sources={name: rates.of(name, count) for name in sorted(rates.sources)},
    )
    return report, kept


def _write_report(out: Path, report: MiningReport) -> None:
    write_json(out / REPORT, report.as_json())
    aside = (*report.set_aside.rows, *report.failed.rows)
    write_whole(out / SET_ASIDE, (json.dumps({"id": row, "reason": why}).encode() + b"\n" for row, why in aside))


def _why_nothing(report: MiningReport, section: MineSection, last_fault: str) -> str:
    if not report.judged:
        return f"none of {report.drawn:,} rows could be judged ({last_fault}); mend that and mine again"
    if section.keep == "all_wrong":
        return (
            f"none of {report.judged:,} rows has wrong answers alone; take keep: mixed, or, in a new --out, a higher "
            "mine.temperature or more rows"
        )
    return (
        f"none of {report.judged:,} rows has right and wrong answers; take keep: all_wrong, or, in a new --out, a "
        "higher mine.temperature, more candidates or more rows"
    )


def pass_rates(report: MiningReport) -> str:
    """The shares of rows with 0 to k right candidates, by source, as an SVG. Raises `MissingExtraError`."""
    largest = sorted(report.sources.items(), key=lambda item: -sum(item[1]))[:_MOST_BARS]
    bars = [("all", report.right), *largest]
    figure, axes = new_axes(height=1.5 + 0.34 * len(bars))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("", (THIRD, OTHER, OWN), N=len(report.right))
    places = range(len(bars))[::-1]
    left = [0.0] * len(bars)
    for number in range(len(report.right)):
        values = [100 * counts[number] / sum(counts) for _, counts in bars]
        axes.barh(places, values, left=left, label=str(number), color=colours(number))
        left = [start + value for start, value in zip(left, values, strict=True)]
    axes.set_yticks(places, [f"{name} ({sum(counts):,})" for name, counts in bars], parse_math=False)
    axes.set(xlim=(0, 100), xlabel="rows, percent", title=f"right answers of {len(report.right) - 1}")
    figure.legend(loc="outside lower center", ncols=min(len(report.right), 9), frameon=False, fontsize=8)
    return svg_of(figure)
