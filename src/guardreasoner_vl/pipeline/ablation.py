"""Ablation of the method's parts (paper, Fig. 6 and Table 3): variants of one recipe, evaluated on the same rows.

OUT/seed-S/base/       the whole method: R-SFT and the full guard
OUT/seed-S/NAME/       a variant; the stages that it does not change are read from `base`
OUT/ablation.md        the table, means over seeds with 95% intervals
OUT/ablation.svg       F1 of each variant
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.evaluation.compare import read_evaluation
from guardreasoner_vl.evaluation.figures import OTHER, OWN, new_axes, svg_of
from guardreasoner_vl.evaluation.metrics import count
from guardreasoner_vl.evaluation.report import NONE, markdown_table
from guardreasoner_vl.evaluation.results import judgement, truth
from guardreasoner_vl.pipeline.run import STAGES, Run, evaluated, run
from guardreasoner_vl.recipe import merged, parse_recipe
from guardreasoner_vl.storage.atomic import write_json, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from guardreasoner_vl.evaluation.report import Table
    from guardreasoner_vl.pipeline.run import Stage
    from guardreasoner_vl.recipe import Recipe, RewardSection
    from guardreasoner_vl.recipe.training import RewardForm

START, WHOLE = "R-SFT", "full"
"""The baselines, seed by seed: F1 is compared with R-SFT, where RL starts, and tokens with the full method."""

Ends = Literal["sft", "grpo"]
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for 95% with 1 to 9 degrees of freedom."""


@dataclass(frozen=True)
class Variant:
    """A variant: its changes to the recipe, the stages to run again, and the stage that writes its model.

    Without stages the variant is the recipe itself.
    """

    changes: Mapping[str, Any]
    stages: tuple[Stage, ...]
    ends: Ends = "grpo"


@dataclass(frozen=True)
class Outcome:
    """One variant with one seed: F1 over all known labels, by request and by response, coverage, output tokens."""

    f1: float | None
    request_f1: float | None
    response_f1: float | None
    coverage: float | None
    tokens: float


def variants(recipe: Recipe) -> dict[str, Variant]:
    """The paper's variants, and one with the other form of the reward.

    A recipe with several modalities has a variant for each; one whose reward depends on lengths has the variant Eco.
    """
    form: RewardForm = "paper" if recipe.grpo.reward.form != "paper" else "bounded"
    rl: tuple[Stage, ...] = ("grpo",)
    alone = recipe.data.modalities if len(recipe.data.modalities) > 1 else ()
    known = {
        "SFT": Variant({"sft": {"without_reasoning": 1.0}, "evaluate": {"mode": "fast"}}, ("sft",), "sft"),
        **{f"R-SFT ({name})": Variant({"data": {"modalities": [name]}}, ("sft",), "sft") for name in alone},
        START: Variant({}, (), "sft"),
        WHOLE: Variant({}, ()),
        "without augmentation": Variant({"augment": {"share": 0.0}}, ("augment", "grpo")),
        "without dynamic clipping": Variant({"grpo": {"clip": {"schedule": "constant"}}}, rl),
        "without length reward": Variant({"grpo": {"reward": _reward_changes("plain")}}, rl),
        **_eco(recipe.grpo.reward, rl),
        f"{form} reward": Variant({"grpo": {"reward": _reward_changes(form)}}, rl),
    }
    return {
        name: variant if _differs(recipe, variant) else replace(variant, stages=()) for name, variant in known.items()
    }


def _reward_changes(form: RewardForm) -> dict[str, Any]:
    """Changes to another form of the reward, without the token cost, which only `bounded` has."""
    return {"form": form, "token_cost": 0.0}


def _eco(reward: RewardSection, stages: tuple[Stage, ...]) -> dict[str, Variant]:
    """Eco: beta = 1/6 (paper); in the `bounded` form that affects only wrong answers, so a token cost is added."""
    changes = {"paper": {}, "bounded": {"token_cost": 0.3}}.get(reward.form)
    return {} if changes is None else {"Eco": Variant({"grpo": {"reward": {"beta": 1 / 6, **changes}}}, stages)}


def build_variants(recipe: Recipe, only: Sequence[str] = ()) -> dict[str, tuple[Variant, Recipe]]:
    """Every variant (or those in `only`) with its recipe; nothing is trained.

    Raises `InputError` for an unknown variant, `RecipeError` for a variant that the recipe does not allow, or for a
    recipe without a model.
    """
    _ = recipe.base
    known = variants(recipe)
    if unknown := [name for name in only if name not in known]:
        raise InputError(f"no variant {unknown[0]!r}: use {', '.join(known)}")
    built: dict[str, tuple[Variant, Recipe]] = {}
    for name, variant in known.items():
        if not only or name in only:
            built[name] = variant, _with_changes(recipe, variant.changes, f"variant {name!r} of {recipe.name}")
    return built


def _differs(recipe: Recipe, variant: Variant) -> bool:
    plain = recipe.model_dump(mode="json")
    return merged(plain, dict(variant.changes)) != plain


def ablate(
    recipe: Recipe,
    data: Path,
    out: Path,
    seeds: int = 1,
    only: Sequence[str] = (),
    tell: Callable[[str], None] = print,
    progress: Callable[[int, int | None], None] | None = None,
) -> Path:
    """Train and evaluate every variant (or those in `only`) with each seed; returns the path of `out/ablation.md`.

    Stages that are finished in `out` are skipped. The errors of `build_variants` are raised before any training.
    """
    built = build_variants(recipe, only)
    outcomes: dict[str, list[Outcome]] = {}
    for seed in range(recipe.seed, recipe.seed + seeds):
        for name, (variant, changed) in built.items():
            tell(f"seed {seed}: {name}")
            folder = out / f"seed-{seed}"
            base = Run(_seeded(recipe, seed), data, folder / "base", tell, progress)
            taken = {stage: base.out for stage in STAGES if stage not in variant.stages}
            job = Run(_seeded(changed, seed), data, folder / name.replace(" ", "-"), tell, progress, taken)
            outcomes.setdefault(name, []).append(_run_variant(variant, base, job))
    return _write_table(out, outcomes, seeds)


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"seed": seed})


def _run_variant(variant: Variant, base: Run, changed: Run) -> Outcome:
    """Run the stages that the variant shares with the whole method, then those that it changes; evaluate the model."""
    run(base, STAGES[: STAGES.index("sft") + 1] if variant.ends == "sft" else STAGES[:-1])
    job = changed if variant.stages else base
    if variant.stages:
        run(job, variant.stages)
    model = job.cold_start if variant.ends == "sft" else job.guard
    return outcome(evaluated(job, variant.ends, model))


def outcome(folder: Path) -> Outcome:
    """The outcome of the evaluation in `folder`."""
    rows = read_evaluation(folder).rows
    pairs = {
        target: [(gold, judgement(row, target).label) for row in rows if (gold := truth(row, target))]
        for target in TARGETS
    }
    both_targets = count(pair for target in TARGETS for pair in pairs[target])
    return Outcome(
        both_targets.f1,
        count(pairs["request"]).f1,
        count(pairs["response"]).f1,
        both_targets.coverage,
        sum(row.completion_tokens for row in rows) / len(rows),
    )


def mean_and_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95% interval by Student's t, which is None for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, _T_95[min(len(values) - 2, len(_T_95) - 1)] * deviation / math.sqrt(len(values))


def _with_changes(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    return parse_recipe(merged(recipe.model_dump(mode="json"), dict(changes)), where)


def _write_table(out: Path, outcomes: Mapping[str, Sequence[Outcome]], seeds: int) -> Path:
    path = out / "ablation.md"
    write_text(path, f"Means over {seeds} seeds, with 95% intervals.\n\n{markdown_table(ablation_table(outcomes))}\n")
    write_json(out / "ablation.json", {name: [vars(run) for run in runs] for name, runs in outcomes.items()})
    figure, axes = new_axes(6.5, 0.6 + 0.32 * len(outcomes))
    names = list(outcomes)[::-1]
    means = [mean_and_interval([100 * (outcome.f1 or 0.0) for outcome in outcomes[name]]) for name in names]
    colours = [OWN if name in (WHOLE, "Eco") else OTHER for name in names]
    axes.barh(names, [mean for mean, _ in means], xerr=[half or 0.0 for _, half in means], color=colours)
    axes.set(xlim=(min(mean for mean, _ in means) - 10, 100), xlabel="F1, requests and responses together")
    write_text(out / "ablation.svg", svg_of(figure))
    return path


def ablation_table(outcomes: Mapping[str, Sequence[Outcome]]) -> Table:
    """One line for each variant: means over seeds, F1 gained over `START` and tokens saved against `WHOLE` per seed."""
    rates = ["requests", "responses", "coverage"]
    rows = [["", "F1", f"F1 above {START}", *rates, "output tokens", f"fewer than {WHOLE}"]]
    for name, runs in outcomes.items():
        first, *cells = [_cell([getattr(run, field) for run in runs], 100) for field in _RATES]
        start, whole = outcomes.get(START, ()), outcomes.get(WHOLE, ())
        gains = [(run.f1 or 0.0) - (baseline.f1 or 0.0) for run, baseline in zip(runs, start, strict=False)]
        saved = [baseline.tokens - run.tokens for run, baseline in zip(runs, whole, strict=False)]
        gain = NONE if name == START else _cell(gains, 100)
        saving = NONE if name == WHOLE else _cell(saved, 1)
        rows.append([name, first, gain, *cells, _cell([run.tokens for run in runs], 1), saving])
    return rows


_RATES = ("f1", "request_f1", "response_f1", "coverage")


def _cell(values: Sequence[float | None], scale: float) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return NONE
    mean, half = mean_and_interval(known)
    return f"{mean:.1f}" if half is None else f"{mean:.1f} \u00b1 {half:.1f}"
