"""Runs the whole method, stage after stage, in one run folder.

    curate -> synthesize -> sft -> mine -> augment -> grpo -> evaluate

Stages are independent: each reads the output of earlier ones from the folder, resumes where it stopped, and is skipped
if it is finished.

OUT/recipe.json        the resolved recipe; a change is refused once a stage has read it (`recipe.run_dir`)
OUT/corpus/            rows and their reasoning
OUT/sft/model/         the cold start
OUT/mine/              hard rows, and the candidates of every row
OUT/augment/           the RL set
OUT/grpo/model/        the guard
OUT/evaluate/          both models on the same rows
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, get_args

from guardreasoner_vl.corpus.store import is_corpus, read_split
from guardreasoner_vl.errors import DataError, RecipeError
from guardreasoner_vl.recipe.run_dir import begin, open_run_dir
from guardreasoner_vl.training.launch import check_deepspeed, check_launch, process_count

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from guardreasoner_vl.engines.base import Engine
    from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark
    from guardreasoner_vl.recipe import BatchLimits, Recipe

Stage = Literal["curate", "synthesize", "sft", "mine", "augment", "grpo", "evaluate"]
STAGES: tuple[Stage, ...] = get_args(Stage)
TRAINING: tuple[Stage, ...] = ("sft", "grpo")
"""Stages that can run on several GPUs; the others need a single process."""


@dataclass(frozen=True)
class Run:
    """One run: its recipe, the folder of its sources, and its own folder.

    `taken` maps stages to the folder of another run whose output is used. `tell` prints a line; `progress` receives the
    number of items done and the total.
    """

    recipe: Recipe
    data: Path
    out: Path
    tell: Callable[[str], None]
    progress: Callable[[int, int | None], None] | None = None
    taken: Mapping[Stage, Path] = field(default_factory=dict)

    @property
    def corpus(self) -> Path:
        """The folder of the corpus."""
        return self._of("curate") / "corpus"

    @property
    def cold_start(self) -> Path:
        """The folder of the model after SFT."""
        return self._of("sft") / "sft" / "model"

    @property
    def hard(self) -> Path:
        """The folder of the hard rows."""
        return self._of("mine") / "mine"

    @property
    def rl_set(self) -> Path:
        """The folder of the RL set: the hard rows, and rows joined from them."""
        return self._of("augment") / "augment"

    @property
    def guard(self) -> Path:
        """The folder of the model after RL."""
        return self._of("grpo") / "grpo" / "model"

    def _of(self, stage: Stage) -> Path:
        return self.taken.get(stage, self.out)


def run(job: Run, stages: Collection[str] = STAGES) -> None:
    """Run `stages` in the method's order.

    Raises `RecipeError` if a stage in the folder has read another recipe, a tracker is not installed or DeepSpeed
    cannot start, `DataError` if another process works there, and `GuardError` if a stage trains, several GPUs are
    visible and no launcher started this process.
    """
    if process_count() > 1 and (alone := [name for name in stages if name not in TRAINING]):
        raise RecipeError(
            f"{', '.join(alone)} cannot run on several processes: give a launcher only --stages {' or '.join(TRAINING)}"
        )
    if any(name in TRAINING for name in stages):
        from guardreasoner_vl.training.trackers import check_installed

        check_launch()  # before the stages ahead of training take their hours
        check_installed(job.recipe.tracker)
        if "sft" in stages:
            check_deepspeed(job.recipe.sft)
    with open_run_dir(job.out, job.recipe, "run"):
        for stage in STAGES:
            if stage in stages:
                job.tell(stage)
                _WORK[stage](job)


def _curate(job: Run) -> None:
    from guardreasoner_vl.stages import curate

    if not is_corpus(job.corpus):
        begin(job.out, job.recipe, "curate")
        report = curate.run(job.recipe, job.data, job.corpus, progress=job.progress)
        job.tell(f"  {report.info.rows:,} of {report.read:,} rows")


def _synthesize(job: Run) -> None:
    from guardreasoner_vl.stages import synthesize
    from guardreasoner_vl.teachers.choose import open_teacher

    section, progress, corpus = job.recipe.synthesize, job.progress, _needed(job.corpus, "curate")
    begin(job.out, job.recipe, "synthesize")
    report = synthesize.run(
        corpus,
        open_teacher(section.teacher, section.model, section.base_url),
        attempts=section.attempts,
        votes=section.votes,
        concurrency=section.concurrency,
        budget=_budget(section.max_cost),
        progress=(lambda now: progress(now.done, now.total)) if progress else None,
    )
    if report.remaining:
        raise DataError(
            f"{report.remaining:,} rows have no reasoning yet (stopped by {report.stopped_by or 'faults'}): "
            "run the same command to resume, or raise synthesize.max_cost"
        )
    job.tell(f"  {report.kept:,} of {report.rows:,} rows have reasoning")


def _sft(job: Run) -> None:
    from guardreasoner_vl.stages import sft

    sft.run(job.recipe, _needed(job.corpus, "curate"), job.out, job.progress)


def _mine(job: Run) -> None:
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.stages import mine

    if mine.is_finished(job.hard, job.recipe):
        return
    model, corpus = _needed(job.cold_start, "sft"), _needed(job.corpus, "curate")
    begin(job.out, job.recipe, "mine")
    with Guard(_engine(model, job.recipe.mine, job.recipe.mine.base_url)) as guard:
        report = mine.run(job.recipe, corpus, guard, job.hard, progress=job.progress)
    if report.unanswered:
        raise DataError(f"{report.unanswered:,} rows got no answer from the engine: run the same command to resume")
    job.tell(f"  {report.kept:,} of {report.judged:,} rows are hard ({job.recipe.mine.keep})")


def _augment(job: Run) -> None:
    from guardreasoner_vl.stages import augment

    hard = _needed(job.hard, "mine")
    begin(job.out, job.recipe, "augment")
    report = augment.run(job.recipe, hard, job.rl_set, progress=job.progress)
    job.tell(f"  {report.hard:,} hard rows and {report.augmented:,} joined ones")


def _grpo(job: Run) -> None:
    from guardreasoner_vl.stages import grpo

    validation = list(read_split(_needed(job.corpus, "curate"), "validation"))
    progress = job.progress
    grpo.run(
        job.recipe,
        _needed(job.cold_start, "sft"),
        _needed(job.rl_set, "augment"),
        job.out,
        validation,
        (lambda now: progress(now.step, now.total)) if progress else None,
    )


def _evaluate(job: Run) -> None:
    from guardreasoner_vl.choices import TARGETS
    from guardreasoner_vl.evaluation.compare import leaderboard, read_evaluation
    from guardreasoner_vl.evaluation.report import markdown_table

    models = {"sft": job.cold_start, "grpo": job.guard}
    folders = [evaluated(job, name, model) for name, model in models.items() if model.is_dir()]
    if not folders:
        raise DataError(f"{job.out}: no model to evaluate; run the stage sft first")
    compared = [read_evaluation(folder) for folder in folders]
    for target in TARGETS:
        job.tell(f"{target}s\n\n{markdown_table(leaderboard(compared, target))}")


def evaluated(job: Run, name: str, model: Path) -> Path:
    """Evaluate one model and write its report; returns the evaluation's folder."""
    from guardreasoner_vl.evaluation.predictions import PREDICTIONS, read_predictions
    from guardreasoner_vl.evaluation.report import write_report
    from guardreasoner_vl.guard import Guard
    from guardreasoner_vl.judging.policy import Policy
    from guardreasoner_vl.stages import evaluate

    section, folder = job.recipe.evaluate, job.out / "evaluate" / name
    policy = Policy(mode=section.mode, max_new_tokens=section.max_new_tokens, retry_new_tokens=section.max_new_tokens)
    with Guard(_engine(model, section, section.base_url), policy) as guard:
        results = evaluate.run(guard, benchmarks(job), folder, progress=job.progress)
    if results.unanswered:
        job.tell(f"  {name}: {results.warnings[-1]}")
    rows = list(read_predictions(folder / PREDICTIONS))
    write_report(results, rows, folder, f"guardreasoner-vl run, stage evaluate, of {name}")
    return folder


def benchmarks(job: Run) -> list[LoadedBenchmark]:
    """The recipe's benchmarks; without any, the corpus's test rows, or else its validation rows."""
    from guardreasoner_vl.evaluation.benchmarks.find import by_source, find

    section = job.recipe.evaluate
    if section.benchmarks:
        loaded = find(section.benchmarks, str(job.data), job.out / "evaluate" / "images")
    else:
        corpus = _needed(job.corpus, "curate")
        rows = list(read_split(corpus, "test")) or list(read_split(corpus, "validation"))
        if not rows:
            raise DataError(
                f"{corpus}: no test and no validation rows to evaluate on; name evaluate.benchmarks, or hold rows "
                "out by data.validation_share, with a new --out"
            )
        loaded = list(by_source(rows, job.corpus))
    return [replace(part, samples=list(islice(part.samples, section.limit))) for part in loaded]


def _needed(folder: Path, stage: Stage) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: run the stage {stage} first")
    return folder


def _engine(model: Path, limits: BatchLimits, base_url: str | None) -> Engine:
    """The model in this process, or on the server at `base_url`, which is told to load it."""
    if base_url is not None:
        return _served(model, base_url)
    from guardreasoner_vl.engines.transformers_engine import TransformersEngine

    return TransformersEngine.load(str(model), max_rows=limits.max_rows, max_tokens=limits.max_tokens)


def _served(model: Path, base_url: str) -> Engine:
    from guardreasoner_vl.engines.model_files import model_info
    from guardreasoner_vl.engines.openai.engine import OpenAIEngine
    from guardreasoner_vl.engines.vllm_engine import reload_weights
    from guardreasoner_vl.engines.vllm_server import CONCURRENCY, TIMEOUT, VLLMServer

    with VLLMServer(base_url) as server:
        reload_weights(server, weights_path=str(model.resolve()))
    info = model_info(str(model), model)
    return OpenAIEngine(base_url=base_url, info=info, max_concurrency=CONCURRENCY, timeout=TIMEOUT).connect()


def _budget(max_cost: float | None) -> Any:
    from guardreasoner_vl.teachers.budget import Budget

    return None if max_cost is None else Budget(max_cost, None)


_WORK: dict[Stage, Callable[[Run], None]] = {
    "curate": _curate,
    "synthesize": _synthesize,
    "sft": _sft,
    "mine": _mine,
    "augment": _augment,
    "grpo": _grpo,
    "evaluate": _evaluate,
}
