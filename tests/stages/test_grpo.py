"""The GRPO stage: exact resume whatever ends a run, what is shipped, its log, and what it refuses."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from guardreasoner_vl.corpus.store import CorpusInfo, read_corpus, write_corpus
from guardreasoner_vl.engines.decoding import Decoder
from guardreasoner_vl.engines.scripted import ScriptedEngine
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import DataError, EngineError, RecipeError
from guardreasoner_vl.rl import clipping, loss, shared_prefix
from guardreasoner_vl.rl.concatenation import SOURCE as JOINED
from guardreasoner_vl.stages import grpo
from guardreasoner_vl.stages.grpo import DivergedError, StoppedError, TrainingStep, run
from guardreasoner_vl.storage.jsonl_log import JsonlLog
from guardreasoner_vl.training.grpo import log as grpo_log
from guardreasoner_vl.training.grpo import rollouts as grpo_rollouts
from guardreasoner_vl.training.grpo import state as grpo_state
from guardreasoner_vl.training.grpo import update as grpo_update
from guardreasoner_vl.training.grpo import validation as grpo_validation
from guardreasoner_vl.training.grpo.log import LogRow, Validation
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.types import Sample
from tests.tiny_model import write_tiny_model
from tests.training.grpo import toy_grpo
from tests.training.grpo.toy_grpo import (
    STEPS,
    assert_equal,
    assert_same_end,
    checkpoints,
    halves,
    log,
    parameters,
    recipe,
    shipped,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PRECISIONS = ("fp32", "bf16-weights")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_grpo.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def rows(data: Path) -> list[Sample]:
    return list(read_corpus(data))


@pytest.fixture(scope="module", autouse=True)
def made_up() -> Iterator[None]:
    with toy_grpo.made_up():
        yield


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path, rows: list[Sample], made_up: None
) -> dict[str, Path]:
    """Finished runs by precision, nothing left out."""
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "draw_training", grpo_log.draw_training)
        for precision in PRECISIONS:
            runs[precision] = tmp_path_factory.mktemp(precision)
            run(recipe(precision=precision), tiny_model, data, runs[precision], rows)
    return runs


@pytest.fixture
def again(tiny_model: Path, data: Path, rows: list[Sample], tmp_path: Path) -> Callable[..., Path]:
    """The same command once more, in one folder."""

    def command(progress: Callable[[TrainingStep], None] | None = None, **section: Any) -> Path:
        return run(recipe(**section), tiny_model, data, tmp_path, rows, progress)

    return command


def raising(error: BaseException, step: int) -> Callable[[TrainingStep], None]:
    def progress(now: TrainingStep) -> None:
        if now.step == step:
            raise error

    return progress


def terminating(step: int) -> Callable[[TrainingStep], None]:
    def progress(now: TrainingStep) -> None:
        if now.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


def planned(patch: pytest.MonkeyPatch, *f1: float) -> None:
    """The F1 of each validation in turn."""
    scores = list(f1)
    patch.setattr(grpo, "validate", lambda *_: Validation(f1=scores.pop(0), coverage=1.0, tokens=2.0))


# --- resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "steps"), [("fp32", [1, 3]), ("fp32", [2]), ("bf16-weights", [3])])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    precision: str, steps: list[int], uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path
) -> None:
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            again(raising(KeyboardInterrupt(), step), precision=precision)
        assert [row["step"] for row in log(tmp_path)] == list(range(step + 1))
        assert not (tmp_path / "grpo" / "model").exists()
    torch.manual_seed(12345)  # what the process drew before does not matter
    again(precision=precision)
    assert_same_end(tmp_path, uninterrupted[precision])


def test_the_start_is_validated_once(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, 0.5, 0.25, 0.25)
    for step in (1, 3):  # without a checkpoint, and with one
        with pytest.raises(KeyboardInterrupt):
            again(raising(KeyboardInterrupt(), step))
    again()
    judged = {row["step"]: row["validation"]["f1"] for row in log(tmp_path) if "validation" in row}
    assert judged == {0: 0.5, 2: 0.25, 4: 0.25}


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest, torch
from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.stages.grpo import run
from tests.training.grpo import toy_grpo

model, data, out = map(Path, sys.argv[1:])
original, saved = torch.save, []

def save(content, path):
    saved.append(path)
    original(content, path)
    if len(saved) == 2:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save
toy_grpo.install(pytest.MonkeyPatch())
run(toy_grpo.recipe(), model, data, out, list(read_corpus(data)))
"""


def test_a_kill_while_a_checkpoint_is_written(
    tiny_model: Path, data: Path, uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-c", KILLED, *map(str, (tiny_model, data, tmp_path))]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert (tmp_path / "grpo" / "checkpoint-4.partial").is_dir()
    assert [row["step"] for row in log(tmp_path)] == [0, 1, 2, 3, 4]
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])
    assert not list((tmp_path / "grpo").glob("*.partial"))


def test_sigterm_in_rollouts(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollouts end early, and the batches before are saved though no checkpoint was due."""
    before = signal.getsignal(signal.SIGTERM)
    judge, judged = grpo_rollouts.judge_completion, []

    def completion(*arguments: Any) -> Any:
        judged.append(1)
        if len(judged) == 16 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(grpo_rollouts, "judge_completion", completion)
        batches = iter([512, 4])  # in the second batch it looks after every group
        original = grpo_rollouts.roll_out

        def roll_out(*arguments: Any) -> Any:
            patch.setattr(grpo_rollouts, "AT_ONCE", next(batches))
            return original(*arguments)

        patch.setattr(grpo, "roll_out", roll_out)
        with pytest.raises(StoppedError, match="stopped after rollout batch 1: the same command resumes there"):
            again()
    assert len(judged) == 16 + 4
    assert checkpoints(tmp_path) == [1]
    assert signal.getsignal(signal.SIGTERM) is before
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])


@pytest.mark.parametrize("step", [1, 2])
def test_sigterm_between_batches(
    step: int, uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(StoppedError, match=f"batch {step}:"):
        again(terminating(step))
    assert checkpoints(tmp_path)[-1] == step
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_sigterm_in_an_update(again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = grpo_update.accumulate

    def accumulate(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(grpo, "accumulate", accumulate)
    with pytest.raises(StoppedError, match="batch 1:"):
        again()
    assert checkpoints(tmp_path) == [1]
    assert log(tmp_path)[-1]["step"] == 1


def test_sigterm_in_the_last_batch_lets_it_finish(again: Callable[..., Path]) -> None:
    assert again(terminating(STEPS)).is_dir()


def test_a_full_disk(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.save

    def save(content: Any, path: Path) -> None:
        if path.parent.name == "checkpoint-4.partial":
            raise OSError(28, "No space left on device")
        original(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(DataError, match=r"checkpoint-4 could not be written \(.*No space left.*\): make room"):
            again()
    assert checkpoints(tmp_path) == [2]
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_no_room_for_the_log_or_the_model(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for place, name, message in (
        (JsonlLog, "_put", r"\.jsonl cannot"),
        (grpo, "write_model", "grpo could not"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(DataError, match=f"{message} be written .*: make room"):
                again()
        assert not (tmp_path / "grpo" / "model").exists()
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_numbers_that_are_none(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(grpo_rollouts, "judge_completion", toy_grpo.rewarding(lambda _: float("nan")))
        with pytest.raises(
            DivergedError, match=r"batch 1: a reward is NaN .* check grpo\.reward\.min_length .* new --out"
        ):
            again()
    count: list[int] = []

    def clipped_loss(*arguments: Any) -> Any:
        count.append(1)
        result = loss.clipped_loss(*arguments)
        return result if len(count) < 6 else type(result)(result.loss * float("nan"), result.clipped)

    with monkeypatch.context() as patch:
        patch.setattr(grpo_update, "clipped_loss", clipped_loss)  # 6: the second update of batch 3
        with pytest.raises(DivergedError, match=r"batch 3: the gradient is NaN .*: lower grpo\.learning_rate"):
            again()
    assert checkpoints(tmp_path) == [2]
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_a_fault_of_the_engine(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("far too many cakes")

    def progress(now: TrainingStep) -> None:
        if now.step == 3:
            monkeypatch.setattr(Decoder, "prefill", broken)

    with pytest.raises(EngineError, match=r"a rollout failed .*run the same command to resume") as raised:
        again(progress)
    monkeypatch.undo()
    assert "cakes" not in str(raised.value)
    assert checkpoints(tmp_path) == [2, 3]  # of after the last whole batch too, though `save_every` is 2
    again()
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_a_resumed_run_maps_the_optimizer_s_state(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank reads its share of it; whole, 3B's would take 30 GB of main memory for each rank."""
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 2))
    mapped, load = list[bool](), torch.load

    def noting(path: Path, **settings: Any) -> Any:
        mapped.append(settings.get("mmap", False))
        return load(path, **settings)

    monkeypatch.setattr(torch, "load", noting)
    again()
    assert mapped == [True]


def test_images_are_attended_to_in_one_call_on_a_gpu(tiny_model: Path) -> None:
    for device, name in (("cpu", "Qwen2_5_VLVisionAttention"), ("meta", "OneCallAttention")):
        for moved in (True, False):
            network = grpo._network(tiny_model, recipe(), torch.device(device), moved)
            assert {type(block.attn).__name__ for block in network.model.visual.blocks} == {name}
            assert {parameter.device.type for parameter in network.parameters()} == {device if moved else "cpu"}


def test_a_broken_checkpoint_is_named(again: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 2))
    (tmp_path / "grpo" / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    with pytest.raises(
        DataError, match=r"checkpoint-2 cannot be read: remove its optimizer\.pt and nothing else, .* from the start"
    ):
        again()


def test_following_the_message_never_loses_the_best_weights(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, 0.1, 0.9, *[0.2] * 9)
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 3), save_every=1, evaluate_every=1)
    best = weights(tmp_path, 1)
    messages = []
    for name in ("checkpoint-3", "checkpoint-2"):
        path = tmp_path / "grpo" / name / "optimizer.pt"
        path.write_bytes(b"half")
        with pytest.raises(DataError, match=f"{name} cannot be read: remove its optimizer") as caught:
            again(save_every=1, evaluate_every=1)
        messages.append(str(caught.value).rpartition(" ")[2])
        path.unlink()
    assert messages == ["checkpoint-2", "start"]
    assert_equal(weights(tmp_path, 1), best)
    planned(monkeypatch, 0.9, *[0.2] * 3)  # the start's stands in the log
    again(save_every=1, evaluate_every=1)
    assert_equal(shipped(tmp_path), halves(best))


def test_a_best_checkpoint_that_is_broken_is_named(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, 0.1, 0.9, *[0.2] * 3)

    def progress(now: TrainingStep) -> None:
        if now.step == 4:
            (tmp_path / "grpo" / "checkpoint-1" / "weights.safetensors").write_bytes(b"half")

    with pytest.raises(DataError, match="checkpoint-1, the best checkpoint, cannot be read: restore it"):
        again(progress, save_every=1, evaluate_every=1)


def test_an_engine_that_fails_in_validation_is_no_worse_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(request: Any) -> str:
        raise EngineError("out of order; try again")

    samples = [Sample(id="a", source="toy", modality="text", prompt="cake", request_label="harmful")]
    with pytest.raises(EngineError, match=r"validation failed \(out of order; try again\): run the same command"):
        grpo_validation.validate(samples, ScriptedEngine(said), 16, DistributedContext())


# --- what is shipped ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("f1", "best"), [((0.3, 0.6, 0.4), 2), ((0.1, 0.2, 0.3), 4), ((0.2, 0.7, 0.7), 2)])
def test_the_best_checkpoint_is_shipped(
    f1: tuple[float, ...], best: int, again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, *f1)
    again(save_every=3)  # the best one is saved though none is due
    assert_equal(shipped(tmp_path), halves(weights(tmp_path, best)))
    report = json.loads((tmp_path / "grpo" / "grpo.json").read_text())
    assert (report["best_step"], report["best_f1"]) == (best, max(f1))


def test_the_start_may_be_the_best(
    tiny_model: Path, again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, 0.6, 0.5, 0.6)
    again()
    assert_equal(shipped(tmp_path), halves(parameters(tiny_model)))
    report = json.loads((tmp_path / "grpo" / "grpo.json").read_text())
    assert report["best_step"] == 0
    assert report["best_f1"] == 0.6
    assert report["weights"].startswith("those of the start")


def test_the_best_weights_stay_when_checkpoints_go(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned(monkeypatch, 0.1, 0.9, *[0.2] * 3)
    again(save_every=1, evaluate_every=1)
    assert checkpoints(tmp_path) == [1, 3, 4]
    kept = sorted(path.name for path in (tmp_path / "grpo" / "checkpoint-1").iterdir())
    assert kept == ["state.json", "weights.safetensors"]
    assert_equal(shipped(tmp_path), halves(weights(tmp_path, 1)))


def test_without_validation_the_last_one_is_shipped(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    finished = run(recipe(steps=2), tiny_model, data, tmp_path)
    assert_equal(shipped(tmp_path), halves(weights(tmp_path, 2)))
    assert [row["step"] for row in log(tmp_path)] == [1, 2]
    assert json.loads((tmp_path / "grpo" / "grpo.json").read_text())["best_f1"] is None
    for name in ("tokenizer.json", "preprocessor_config.json"):
        assert (finished / name).read_bytes() == (tiny_model / name).read_bytes()
    assert TransformersEngine.load(str(finished)).network.dtype in (torch.bfloat16, torch.float32)


def test_a_finished_run_is_not_repeated(
    tiny_model: Path, data: Path, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(grpo, "roll_out", never)
    out = uninterrupted["fp32"]
    assert run(recipe(), tiny_model, data, out) == out / "grpo" / "model"


# --- what it does -------------------------------------------------------------------------------------


def test_batches_follow_from_the_seed(
    again: Callable[..., Path], rows: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch takes every row once at most, in another order."""
    seen: list[list[str]] = []
    original = grpo_rollouts.roll_out

    def roll_out(samples: list[Sample], *others: Any) -> Any:
        seen.append([sample.id for sample in samples])
        return original(samples, *others)

    monkeypatch.setattr(grpo, "roll_out", roll_out)
    again()
    assert list(map(len, seen)) == [4, 4, 4, 4]
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert len(set(first)) == len(set(second)) == 8
    assert first != second
    assert set(first) <= {row.id for row in rows}


def test_only_later_updates_take_another_pass(again: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollout batch of two updates is three passes: the first update's old model is the model itself."""
    passes, bounds, olds = [], [], []
    original = grpo_update.accumulate

    def log_probabilities(*arguments: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return shared_prefix.log_probabilities(*arguments)

    def accumulate(network: Any, passes: Any, old: Any, bound: float, section: Any) -> Any:
        bounds.append(bound)
        olds.append(old is None)
        return original(network, passes, old, bound, section)

    monkeypatch.setattr(grpo_update, "log_probabilities", log_probabilities)
    monkeypatch.setattr(grpo, "accumulate", accumulate)
    again(steps=2)
    assert passes == [False, True, True] * 2
    assert olds == [True, False] * 2
    section = recipe().grpo.clip
    assert bounds == [value for s in (1, 2) for value in [clipping.bound(section, s, 2)] * 2]


@pytest.mark.parametrize(("rate", "least", "most"), [(3e-2, 0.1, 1.0), (1e-9, 0.0, 0.0)])
def test_clipping_follows_how_far_the_model_went(
    rate: float, least: float, most: float, again: Callable[..., Path], tmp_path: Path
) -> None:
    again(steps=1, learning_rate=rate, clip={"schedule": "constant"})
    assert least <= log(tmp_path)[1]["clip_fraction"] <= most


def test_a_batch_without_signal(
    tiny_model: Path, again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer is worth the same: weights only decay, matrices that is."""
    monkeypatch.setattr(grpo_rollouts, "judge_completion", toy_grpo.rewarding(lambda _: 0.0))
    again(steps=1, learning_rate=1e-2, weight_decay=0.1)
    start, end = parameters(tiny_model), weights(tmp_path, 1)
    for name, value in start.items():
        wanted = value * (1 - 1e-2 * 0.1) ** 2 if value.dim() > 1 else value  # two updates
        torch.testing.assert_close(end[name], wanted.detach(), rtol=1e-6, atol=0, msg=name)
    row = log(tmp_path)[1]
    assert (row["with_signal"], row["gradient_norm"], row["loss"], row["clip_fraction"]) == (0, 0, 0, 0)


def test_momentum_acts_in_a_batch_without_signal(
    again: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def progress(_: TrainingStep) -> None:
        monkeypatch.setattr(grpo_rollouts, "judge_completion", toy_grpo.rewarding(lambda _: 0.0))

    again(progress, steps=2, save_every=1, weight_decay=0.0)
    assert [row["with_signal"] for row in log(tmp_path)[1:]] == [1.0, 0.0]
    first, second = weights(tmp_path, 1), weights(tmp_path, 2)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_frozen_tower_stays(tiny_model: Path, again: Callable[..., Path], tmp_path: Path) -> None:
    again(steps=1, freeze_vision=True, evaluate_every=None)
    start, end = halves(parameters(tiny_model)), shipped(tmp_path)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("language_model" in name for name in changed)
    assert not any("visual" in name for name in changed)
    assert not any("visual" in name for name in weights(tmp_path, 1))  # the start model has them


def test_the_tower_learns_from_a_mixed_batch(uninterrupted: dict[str, Path]) -> None:
    before, after = (weights(uninterrupted["fp32"], step) for step in (2, 4))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("visual." in name for name in changed)
    assert any("language_model" in name for name in changed)


def test_checkpointing_gives_the_same_weights(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path
) -> None:
    again(gradient_checkpointing=True)
    torch.testing.assert_close(weights(tmp_path), weights(uninterrupted["fp32"]), rtol=0, atol=1e-6)


# --- its log ------------------------------------------------------------------------------------------


def test_tensorboard_holds_every_figure_once(again: Callable[..., Path], tmp_path: Path) -> None:
    """A resume hides what was written of the batches that it does again."""
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 3))
    again()
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")  # has no types
    events = module.EventAccumulator(str(tmp_path / "grpo" / "tensorboard"))
    events.Reload()
    kept = log(tmp_path)
    for name in ("reward", "safety", "tokens", "clip_fraction", "bound", "with_signal", "loss", "gradient_norm"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(row["step"], pytest.approx(row[name])) for row in kept[1:]], name
    values = [(event.step, event.value) for event in events.Scalars("validation/f1")]
    assert values == [(row["step"], pytest.approx(row["validation"]["f1"])) for row in kept if "validation" in row]
    assert [event.step for event in events.Scalars("update_seconds")] == [1, 2, 3, 4]


def test_the_figure_is_drawn_from_any_rows(uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    assert "validation F1" in (uninterrupted["fp32"] / "grpo" / "training.svg").read_text()
    kept = grpo_log.read_log(uninterrupted["fp32"] / "grpo", STEPS)
    for part in (kept[:1], kept[1:2]):  # nothing trained yet, nothing validated
        assert grpo_log.draw_training(tmp_path, part).read_text().startswith("<svg")


def test_rows_beyond_the_checkpoint_and_torn_ones_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with grpo_log.Log(tmp_path, 2, recipe()) as opened:
        assert [row.step for row in opened.rows] == [0, 1, 2]
        opened.append(LogRow(step=3, reward=1.0))
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "reward": 1.0}\n'
    path.write_text('{"step": 0}\nno row\n')
    with pytest.raises(DataError, match=r"log\.jsonl, line 2: not a row of the log"):
        grpo_log.read_log(tmp_path, 2)
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 1}\n')
    with pytest.raises(DataError, match="line 3: repeats the row of line 2"):
        grpo_log.read_log(tmp_path, 2)


# --- what cannot be trained on ------------------------------------------------------------------------


def test_rows_are_skipped_and_counted(tiny_model: Path, rows: list[Sample], tmp_path: Path) -> None:
    text = next(row for row in rows if row.modality == "text")
    joined = text.model_copy(update={"source": JOINED, "id": "joined/1"})
    (tmp_path / "broken.png").write_bytes(b"no image")
    odd = [
        text.model_copy(update={"id": "long", "prompt": "bread and " * 100}),
        joined.model_copy(update={"id": "joined/2", "prompt": "cake and " * 100}),
        joined,
        text.model_copy(update={"id": "unlabelled", "request_label": None, "response_label": None}),
        text.model_copy(update={"id": "broken", "images": (str(tmp_path / "broken.png"),)}),
        text.model_copy(update={"id": "held out", "split": "validation"}),
    ]
    write_corpus(tmp_path / "corpus", CorpusInfo(name="toy"), [*rows[:2], *odd])
    with pytest.raises(DataError, match=r"3 rows can be trained on, a rollout batch takes 4 .*grpo\.rollout_batch"):
        run(recipe(), tiny_model, tmp_path / "corpus", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "grpo" / "data.json").read_text())
    assert report == {
        "rows": 3,
        "by_source": {"toy": 2, JOINED: 1},
        "skipped": {"its prompt is longer than 120 tokens": 2, "no label is known": 1, "invalid_image": 1},
    }


def test_a_prompt_leaves_room_for_an_answer(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """The tiny model reads 512 tokens."""
    with pytest.raises(DataError, match=r"'its prompt is longer than 41 tokens': \d+"):
        run(recipe(max_completion_length=512 - 41), tiny_model, data, tmp_path)


def test_a_resumed_run_measures_no_image_again(
    again: Callable[..., Path], rows: list[Sample], measured_images: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 2))
    assert sorted(measured_images) == sorted({path for row in rows for path in row.images})
    measured_images.clear()
    again()
    assert measured_images == []


def test_another_recipe_or_other_rows_are_refused(
    tiny_model: Path, rows: list[Sample], again: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 2))
    with pytest.raises(RecipeError, match=r"changed: grpo\.learning_rate"):
        again(learning_rate=1e-4)
    write_corpus(tmp_path / "corpus", CorpusInfo(name="toy"), rows[1:])
    with pytest.raises(DataError, match=r"changed: rows"):
        run(recipe(), tiny_model, tmp_path / "corpus", tmp_path, rows)


def test_other_texts_images_or_weights_under_the_same_names_are_refused(
    tiny_model: Path, data: Path, rows: list[Sample], again: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 2))
    before = {path: path.read_bytes() for path in (tmp_path / "grpo").rglob("*") if path.is_file()}
    folder = tmp_path / "corpus"
    for changed in ({"prompt": "another cake"}, {"request_label": "harmful"}):
        assert rows[0].model_copy(update=changed) != rows[0]
        write_corpus(folder, CorpusInfo(name="toy"), [rows[0].model_copy(update=changed), *rows[1:]])
        with pytest.raises(
            DataError, match=r"holds an RL run with other inputs \(changed: rows\); restore them or name a new output"
        ):
            run(recipe(), tiny_model, folder, tmp_path, rows)
    shown = next(row for row in rows if row.images)
    image = tmp_path / "images" / Path(shown.images[0]).name
    image.parent.mkdir()
    with Image.open(shown.images[0]) as old:
        Image.new("RGB", old.size, (1, 2, 3)).save(image)
    repainted = [row.model_copy(update={"images": (str(image),)}) if row.id == shown.id else row for row in rows]
    write_corpus(folder, CorpusInfo(name="toy"), repainted)
    with pytest.raises(DataError, match=r"changed: rows"):
        run(recipe(), tiny_model, folder, tmp_path, rows)
    other = write_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(DataError, match=r"changed: model\)"):
        run(recipe(), other, data, tmp_path, rows)
    retold = shutil.copytree(tiny_model, tmp_path / "retold")
    content = json.loads((retold / "tokenizer_config.json").read_text())
    (retold / "tokenizer_config.json").write_text(json.dumps({**content, "model_max_length": 77}))
    with pytest.raises(DataError, match=r"changed: model\)"):
        run(recipe(), retold, data, tmp_path, rows)
    assert {path: path.read_bytes() for path in before} == before
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    run(recipe(), moved, data, tmp_path, rows)


def test_what_changes_no_result_may_change(
    uninterrupted: dict[str, Path], again: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 2))
    with pytest.raises(KeyboardInterrupt):
        again(raising(KeyboardInterrupt(), 3), save_every=1, pass_tokens=64)
    again(save_every=3, gradient_checkpointing=True)
    torch.testing.assert_close(weights(tmp_path), weights(uninterrupted["fp32"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("limit", [40_000, 1_200_000])
def test_a_disk_that_takes_only_so_much(limit: int, tiny_model: Path, tmp_path: Path) -> None:
    """What safetensors and torch themselves raise when a file cannot grow."""
    resource = pytest.importorskip("resource")
    network = torch.nn.Linear(512, 512)  # 1 MB of weights, 2 MB of moments
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        state, tensors = grpo_state.State(1, "x", "y", "z"), network.state_dict()
        with pytest.raises(DataError, match="make room"):
            grpo_state.save_checkpoint(tmp_path, tensors, optimizer.state_dict(), state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
