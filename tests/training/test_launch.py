"""Several GPUs need a launcher: every way to train refuses them without one, before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from guardreasoner_vl.errors import GuardError, RecipeError
from guardreasoner_vl.pipeline import run as pipeline
from guardreasoner_vl.pipeline.run import STAGES, Run
from guardreasoner_vl.recipe import GrpoSection, SftSection
from guardreasoner_vl.stages import grpo, sft
from guardreasoner_vl.training import launch
from guardreasoner_vl.training.launch import (
    PATIENCE,
    check_deepspeed,
    check_launch,
    peers_alive,
    process_count,
    shards_weights,
)
from guardreasoner_vl.training.sft_trainer import sft_config
from tests.smoke import PATH, short_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REFUSAL = r"4 GPUs are visible .* `accelerate launch --num_processes 4 .* set CUDA_VISIBLE_DEVICES=0"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the number of visible GPUs; no launcher started this process."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "train",
    [
        lambda out: sft.run(short_recipe(), out, out),
        lambda out: grpo.run(short_recipe(), out, out, out),
        lambda out: pipeline.run(Run(short_recipe(), out, out, print), STAGES),
    ],
    ids=["sft", "grpo", "run"],
)
def test_several_gpus_without_a_launcher_are_refused(
    train: Callable[[Path], object], gpus: Callable[[int], None], tmp_path: Path
) -> None:
    gpus(4)
    with pytest.raises(GuardError, match=REFUSAL) as caught:
        train(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_gpu_or_a_launcher_is_accepted(gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 1):
        gpus(count)
        check_launch()
    gpus(4)
    with pytest.raises(GuardError, match=REFUSAL):
        check_launch()
    monkeypatch.setenv("LOCAL_RANK", "2")
    check_launch()


def test_deepspeed_needs_a_launcher_on_one_gpu_too(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without one it ends in its search for MPI; the run is refused before the stages ahead of SFT."""
    gpus(1)
    monkeypatch.setattr(launch, "find_spec", lambda _: object())
    recipe = short_recipe(sft={"deepspeed": {"bf16": {}}, "precision": "bf16"})
    with pytest.raises(RecipeError, match=r"`torchrun --nproc-per-node 1 --no-python .*, or set it to null$"):
        pipeline.run(Run(recipe, tmp_path / "out", tmp_path / "out", print), STAGES)
    assert not (tmp_path / "out").exists()
    check_deepspeed(SftSection())
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_deepspeed(recipe.sft)


def test_deepspeed_by_accelerate_s_configuration_is_refused(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    ports = ["--num_machines", "1", "--main_process_port", "0"]
    arguments = ["--use_deepspeed", "--num_processes", "2", *ports, "--mixed_precision", "no", "--no_python", "x"]
    settings = launch_command_parser().parse_args(arguments)
    settings.deepspeed_fields_from_accelerate_config = []  # as `accelerate launch` sets it
    _, environment = prepare_deepspeed_cmd_env(settings)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"launch without it, and give DeepSpeed's settings as sft\.deepspeed$"):
        check_launch()
    # SFT's trainer sets the other one itself, and RL may follow in the same process.
    monkeypatch.delenv("ACCELERATE_CONFIG_DS_FIELDS")
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    check_launch()


def test_sft_waits_as_long_for_another_process_as_rl_does(tmp_path: Path) -> None:
    """The first process may read sources, make the start model and measure images for longer than torch's default."""
    config = sft_config(SftSection(precision="fp32"), tmp_path, seed=0, use_cpu=True)
    assert config.ddp_timeout == PATIENCE.total_seconds() == 6 * 3600


def test_a_total_batch_is_shared_by_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = SftSection(total_batch=192, gradient_accumulation=3, precision="fp32")
    for count, passes in ((1, 32), (4, 8), (8, 4)):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        assert process_count() == count
        assert section.accumulated(process_count()) == passes
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(RecipeError, match=r"sft\.total_batch 192 is not a multiple of 6 rows .* on 5 devices"):
        sft_config(section, tmp_path, seed=0, use_cpu=True)
    monkeypatch.delenv("WORLD_SIZE")
    assert sft_config(section, tmp_path, seed=0, use_cpu=True).gradient_accumulation_steps == 32
    assert section.model_copy(update={"total_batch": None}).accumulated(5) == 3


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Sets the environment that `accelerate launch` gives the processes for a configuration file."""

    def set_up(config: Path) -> None:
        arguments = ["--config_file", str(config), "--num_processes", "2", "--no_python", "guardreasoner-vl"]
        settings, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
        for name, value in prepare_multi_gpu_env(settings).items():
            if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORLD_SIZE", "2")

    return set_up


def test_weights_are_shared_by_recipe_or_by_accelerate_s_configuration(
    launched: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = (SftSection(precision="fp32"), GrpoSection(precision="fp32"))
    asking = [section.model_copy(update={"shard_weights": True}) for section in sections]
    assert not any(map(shards_weights, [*sections, *asking]))  # one process has nobody to share with
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [shards_weights(section) for section in [*sections, *asking]] == [False, False, True, True]
    launched(PATH.parent / "accelerate" / "fsdp2.yaml")
    assert all(map(shards_weights, [*sections, *asking]))


def test_a_configuration_that_does_not_suit_the_recipe(
    launched: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(PATH.parent / "accelerate" / "fsdp2.yaml")
    for section, reason in (
        (GrpoSection(precision="bf16-weights"), "use precision bf16, which computes in bf16"),
        (SftSection(deepspeed={"bf16": {}}), "shard_weights and deepspeed exclude each other"),
    ):
        with pytest.raises(RecipeError, match=f"accelerate's configuration shards the weights: .*{reason}"):
            shards_weights(section)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match="set fsdp_version: 2"):
        shards_weights(GrpoSection())


def test_the_shipped_configuration_is_accelerate_s() -> None:
    config = load_config_from_file(str(PATH.parent / "accelerate" / "fsdp2.yaml"))
    assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)
    assert not config.fsdp_config["fsdp_cpu_ram_efficient_loading"]


def test_an_error_that_is_not_of_a_peer_passes() -> None:
    for error, seen in (
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), GuardError),
        (torch.distributed.DistBackendError("NCCL error"), GuardError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ):
        with pytest.raises((GuardError, RuntimeError)) as caught, peers_alive():
            raise error
        assert type(caught.value) is seen
