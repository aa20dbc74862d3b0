"""The SFT stage: exact resume, a finished folder, its reports, and what it refuses."""

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

import accelerate.tracking
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.errors import DataError, RecipeError
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.recipe import Recipe
from guardreasoner_vl.stages import sft
from guardreasoner_vl.stages.sft import last_checkpoint, run
from guardreasoner_vl.training import launch, sft_trainer
from tests.training import toy
from tests.training.fake_trackers import FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
ROWS = 20  # 5 updates of 2 x 2 rows an epoch, 2 epochs: checkpoints at 2, 4, 6, 8, 10
PRECISIONS = ("fp32", "bf16-weights")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("data"), toy.rows(ROWS))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """Finished runs by precision."""
    runs = {}
    for precision in PRECISIONS:
        out = tmp_path_factory.mktemp(precision)
        run(toy.recipe(precision=precision), data, out)
        runs[precision] = out
    return runs


class Stop(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def stopped_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Recipe, Path, Path], None]:
    """Run a recipe up to one step."""
    original = sft_trainer.build_trainer

    def stop(step: int, recipe: Recipe, data: Path, out: Path) -> None:
        def build(*args: Any) -> Any:
            trainer = original(*args)
            trainer.add_callback(Stop(step))
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(sft_trainer, "build_trainer", build)
            with pytest.raises(KeyboardInterrupt):
                run(recipe, data, out)

    return stop


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (out / "sft").glob("checkpoint-*"))


def assert_same_end(out: Path, other: Path) -> None:
    """The last checkpoints agree to the bit, in weights, optimizer and the last gradient's length."""
    interrupted, theirs = (folder / "sft" / "checkpoint-10" for folder in (out, other))
    for path in ("sft/model/model.safetensors", "sft/checkpoint-10/model.safetensors"):
        first, second = load_file(out / path), load_file(other / path)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), path
    first, second = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (interrupted, theirs))
    assert all(torch.equal(a, b) for a, b in zip(first.get("masters", []), second.get("masters", []), strict=True))
    for key, state in first["state"].items():
        assert all(torch.equal(state[name], second["state"][key][name]) for name in state)
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (interrupted, theirs)]
    assert [entry["grad_norm"] for entry in logs[0]] == [entry["grad_norm"] for entry in logs[1]]


# 3: in the first epoch; 7: in the second, whose order is another; 5: at the turn.
@pytest.mark.parametrize(
    ("precision", "steps"), [("fp32", [3, 7]), ("bf16-weights", [7]), ("bf16-weights", [1, 3, 5]), ("fp32", [9])]
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    precision: str,
    steps: list[int],
    data: Path,
    uninterrupted: dict[str, Path],
    stopped_at: Callable[..., None],
    tmp_path: Path,
) -> None:
    recipe = toy.recipe(precision=precision)
    for step in steps:
        stopped_at(step, recipe, data, tmp_path)
        assert not (tmp_path / "sft" / "model").exists()
        assert max(checkpoints(tmp_path), default=0) == step // 2 * 2
    torch.manual_seed(12345)  # what the process drew before does not matter
    run(recipe, data, tmp_path)
    assert_same_end(tmp_path, uninterrupted[precision])


def test_a_resumed_run_measures_no_image_again(
    data: Path, stopped_at: Callable[..., None], measured_images: list[str], tmp_path: Path
) -> None:
    stopped_at(3, toy.recipe(), data, tmp_path)
    assert len(measured_images) == len({*measured_images}) == 6  # every colour once
    measured_images.clear()
    run(toy.recipe(), data, tmp_path)
    assert measured_images == []


def test_a_turn_between_epochs_is_exact_too(data: Path, stopped_at: Callable[..., None], tmp_path: Path) -> None:
    recipe = toy.recipe(save_steps=5)
    run(recipe, data, tmp_path / "straight")
    stopped_at(6, recipe, data, tmp_path / "broken")
    assert checkpoints(tmp_path / "broken") == [5]
    run(recipe, data, tmp_path / "broken")
    assert_same_end(tmp_path / "broken", tmp_path / "straight")


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer
from guardreasoner_vl.stages.sft import run
from tests.training import toy
from tests.training.fake_trackers import FakeServer

original = Trainer._save_rng_state

def save(self, output_dir):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, output_dir)

Trainer._save_rng_state = save
run(toy.recipe(precision="bf16-weights"), Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_kill_while_a_checkpoint_is_written(data: Path, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(data), str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert checkpoints(tmp_path) == [2, 4]
    assert last_checkpoint(tmp_path / "sft") == str(tmp_path / "sft" / "checkpoint-2")
    run(toy.recipe(precision="bf16-weights"), data, tmp_path)
    assert_same_end(tmp_path, uninterrupted["bf16-weights"])


# --- checkpoints --------------------------------------------------------------------------------------

PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def write_checkpoint(folder: Path, step: int, *parts: str, state: str = "{}") -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in parts:
        (path / name).touch()
    (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    write_checkpoint(tmp_path, 2, *PARTS)
    whole = write_checkpoint(tmp_path, 10, *PARTS)
    for step, missing in enumerate(PARTS, 11):
        write_checkpoint(tmp_path, step, *(part for part in PARTS if part != missing))
    write_checkpoint(tmp_path, 20, *PARTS, state="")
    write_checkpoint(tmp_path, 21, *PARTS, state='{"log_hist')
    (tmp_path / "checkpoint-22").mkdir()
    assert last_checkpoint(tmp_path) == str(whole)


@pytest.mark.parametrize(
    "parts",
    [
        ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"),
        ("model.safetensors.index.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        ("model.safetensors", "global_step4", "scheduler.pt", "rng_state_0.pth"),
        ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
    ],
)
def test_checkpoints_of_several_devices_count(tmp_path: Path, parts: tuple[str, ...]) -> None:
    whole = write_checkpoint(tmp_path, 4, *parts)
    assert last_checkpoint(tmp_path) == str(whole)


@pytest.mark.parametrize(
    ("part", "content"), [("model.safetensors", None), ("optimizer.pt", None), ("optimizer.pt", b"broken")]
)
def test_a_broken_checkpoint_is_named(
    part: str, content: bytes | None, data: Path, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    """`None` stands for the file without its end."""
    out = shutil.copytree(uninterrupted["fp32"], tmp_path / "run")
    shutil.rmtree(out / "sft" / "model")
    broken = out / "sft" / "checkpoint-10" / part
    broken.write_bytes(broken.read_bytes()[:-100] if content is None else content)
    with pytest.raises(DataError, match=r"checkpoint-10 cannot be read: remove it, then run the same command"):
        run(toy.recipe(), data, out)


def test_only_two_checkpoints_are_kept(uninterrupted: dict[str, Path]) -> None:
    assert checkpoints(uninterrupted["fp32"]) == [8, 10]


# --- the finished folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_finished_folder_is_a_complete_model_in_bf16(precision: str, uninterrupted: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    folder = uninterrupted[precision] / "sft" / "model"
    weights = load_file(folder / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert sum("embed_tokens" in name or "lm_head" in name for name in weights) == 1
    trained = load_file(uninterrupted[precision] / "sft" / "checkpoint-10" / "model.safetensors")
    assert all(torch.equal(value.to(torch.bfloat16), weights[name]) for name, value in trained.items())
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, use_safetensors=True)
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config().use_cache
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.text_config.vocab_size
    base = uninterrupted[precision] / "base"
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()
    assert not list(folder.parent.glob("*.partial"))


def test_a_finished_run_is_not_repeated(
    data: Path, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(sft_trainer, "build_trainer", never)
    out = uninterrupted["fp32"]
    weights = out / "sft" / "model" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    assert run(toy.recipe(), data, out) == out / "sft" / "model"
    assert weights.stat().st_mtime_ns == stamp


def test_a_changed_recipe_is_refused(data: Path, uninterrupted: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"changed: sft\.epochs, sft\.learning_rate"):
        run(toy.recipe(epochs=3, learning_rate=1e-3), data, uninterrupted["fp32"])


def test_training_can_start_from_a_folder(data: Path, uninterrupted: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "start"
    shutil.copytree(uninterrupted["fp32"] / "sft" / "model", base)
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    before_limits = (base / "preprocessor_config.json").read_bytes()
    content = toy.recipe(epochs=0.2).model_dump()
    recipe = Recipe.model_validate({**content, "model": {"path": str(base), "max_pixels": 28 * 56}})
    finished = run(recipe, data, tmp_path / "out")
    limited_inputs = QwenInputs.from_folder(finished)
    assert limited_inputs.budget == PixelBudget(toy.SHAPE["min_pixels"], 28 * 56)
    large = Image.new("RGB", (300, 200))
    as_vllm_reads = Qwen2VLImageProcessorPil.from_pretrained(finished)(large, return_tensors="pt").image_grid_thw
    assert as_vllm_reads.tolist() == [[1, *limited_inputs.grid(large.height, large.width)]]
    assert (base / "preprocessor_config.json").read_bytes() == before_limits
    limited, whole = (
        json.loads((out / "sft" / "data.json").read_text()) for out in (tmp_path / "out", uninterrupted["fp32"])
    )
    assert limited["rows"] == whole["rows"]
    assert limited["tokens"] < whole["tokens"]
    assert not (tmp_path / "out" / "base").exists()
    assert not (finished / "model.safetensors.index.json").exists()
    assert (finished / "tokenizer.json").is_file()
    before, after = load_file(base / "model.safetensors"), load_file(finished / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


# --- reports ------------------------------------------------------------------------------------------


def test_a_frozen_tower_stays_and_the_decoder_learns(data: Path, tmp_path: Path) -> None:
    finished = run(toy.recipe(precision="bf16-weights", freeze_vision=True), data, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", finished))
    changed = {name for name in after if not torch.equal(before[name].to(torch.bfloat16), after[name])}
    assert changed
    assert not any("visual." in name for name in changed)


def test_frozen_layers_and_embeddings_stay_and_the_others_learn(data: Path, tmp_path: Path) -> None:
    finished = run(toy.recipe(precision="fp32", freeze_layers=1), data, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", finished))
    changed = {name for name in after if not torch.equal(before[name].to(torch.bfloat16), after[name])}
    assert any("layers.1." in name for name in changed)
    assert not any("layers.0." in name or "embed_tokens" in name for name in changed)


def test_freezing_every_layer_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sft\.freeze_layers is 9, but the model has 2 layers; give fewer"):
        run(toy.recipe(freeze_layers=9), data, tmp_path)


def test_the_report_says_what_was_trained_on(tmp_path: Path, stopped_at: Callable[..., None]) -> None:
    content = toy.rows(12)
    long = {**content[0], "id": "long-1", "prompt": "word " * 400}
    unlabelled = {**content[0], "id": "unlabelled-1", "request_label": None}
    broken = {**content[4], "id": "broken-1", "images": ["broken.png"]}
    data = toy.write_data(tmp_path / "data", [*content, long, unlabelled, broken])
    (data / "toy" / "broken.png").write_bytes(b"no image")
    with (data / "toy" / "train.jsonl").open("a") as lines:
        lines.write("not json\n{}\n")
    drawn = {"sources": [toy.SOURCE], "synthetic_images": {"count": 3}}
    stopped_at(1, toy.recipe(drawn), data, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "sft" / "data.json").read_text())
    assert report["skipped"] == {
        "longer than 300 tokens": 1,
        "no label is known": 1,
        "invalid_image": 1,
        "not JSON": 1,
        "id: field required": 1,
    }
    assert report["by_source"] == {"toy": 12, "drawn": 3}
    assert report["rows"] == 15
    assert 15 * 20 < report["supervised_tokens"] < report["tokens"] < 15 * 300


def test_the_loss_is_written_for_tensorboard_and_falls(data: Path, tmp_path: Path) -> None:
    run(toy.recipe(epochs=12, save_steps=1000), data, tmp_path)
    losses = tensorboard_losses(tmp_path)
    assert [step for step, _ in losses] == [10, 20, 30, 40, 50, 60]
    assert losses[0][1] > 3
    assert losses[-1][1] < 0.6 * losses[0][1]


def test_a_resume_reports_no_step_twice(
    data: Path,
    stopped_at: Callable[[int, Recipe, Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run stops at step 12 and resumes from the checkpoint at 8, so that step 10 is done twice."""
    server = FakeServer(monkeypatch)
    recipe = toy.recipe(epochs=4, save_steps=8).model_copy(update={"tracker": ("tensorboard", "mlflow")})
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: recipe.tracker)
    stopped_at(12, recipe, data, tmp_path)
    run(recipe, data, tmp_path)
    losses = tensorboard_losses(tmp_path)
    (remote,) = server.runs.values()
    points = [(step, values["train/loss"]) for step, values in remote.points if "train/loss" in values]
    assert [step for step, _ in points] == [step for step, _ in losses] == [10, 20]
    assert points[-1] == pytest.approx(losses[-1])


def tensorboard_losses(out: Path) -> list[tuple[int, float]]:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")  # has no types
    events = module.EventAccumulator(str(out / "sft" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


# --- what cannot be trained on ------------------------------------------------------------------------


def test_nothing_to_train_on(tmp_path: Path) -> None:
    data = toy.write_data(tmp_path / "data", [])
    (data / "toy" / "train.jsonl").write_text("broken\n")
    with pytest.raises(DataError, match="toy"):
        run(toy.recipe(), data, tmp_path / "out")
    with pytest.raises(DataError, match="no row can be trained on"):
        run(toy.recipe({"sources": []}), data, tmp_path / "empty")
    assert not (tmp_path / "empty" / "base").exists()  # no tokenizer was learnt from nothing


def test_no_row_fits(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row can be trained on \(skipped: {'longer than 32 tokens': 20}\)"):
        run(toy.recipe(max_length=32), data, tmp_path)


def test_a_half_written_base_is_made_again(
    data: Path, uninterrupted: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from guardreasoner_vl.training import small_model

    def killed(folder: Path, *args: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(small_model, "write_new_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run(toy.recipe(), data, tmp_path)
    assert not (tmp_path / "base").exists()
    run(toy.recipe(), data, tmp_path)
    assert_same_end(tmp_path, uninterrupted["fp32"])


def test_images_with_many_readings_are_all_seen(tmp_path: Path) -> None:
    """A transparent image counts as several, in the tokens and in the batch."""
    data = toy.write_data(tmp_path / "data", toy.rows(4))
    Image.new("RGBA", (56, 56), (200, 0, 0, 100)).save(data / "toy" / "clear.png")
    extra = {**toy.row(4), "id": "clear-0", "images": ["clear.png"]}
    with (data / "toy" / "train.jsonl").open("a") as lines:
        lines.write(json.dumps(extra) + "\n")
    run(toy.recipe(epochs=1, save_steps=100), data, tmp_path / "out")
    assert (tmp_path / "out" / "sft" / "model" / "model.safetensors").is_file()


def test_the_stage_says_what_to_install(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    from guardreasoner_vl.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "guardreasoner_vl.training.sft_trainer", None)
    with pytest.raises(MissingExtraError, match=r"install guardreasoner-vl with the extra 'train'"):
        sft.run(toy.recipe(), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_deepspeed_is_reported_first(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match="pip install deepspeed"):
        sft.run(toy.recipe(deepspeed={"zero_optimization": {"stage": 2}}), data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_rows_or_weights_under_the_same_names_are_refused(
    data: Path, stopped_at: Callable[..., None], tmp_path: Path
) -> None:
    recipe, out = toy.recipe(), tmp_path / "out"
    stopped_at(3, recipe, data, out)
    changed = shutil.copytree(data, tmp_path / "changed")
    path = changed / "toy" / "train.jsonl"
    path.write_text(path.read_text().replace("cake", "loaf", 1))
    with pytest.raises(
        DataError, match=r"holds an SFT run with other inputs \(changed: rows\); restore them or name a new output"
    ):
        run(recipe, changed, out)
    weights = out / "base" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(DataError, match=r"changed: weights"):
        run(recipe, data, out)
    weights.write_bytes(before)
    run(toy.recipe(save_steps=3, gradient_checkpointing=True), data, out)
    with pytest.raises(RecipeError, match=r"changed: sft\.learning_rate"):
        run(toy.recipe(learning_rate=1e-5), data, out)
