"""vLLM as the sampler of online RL: a server, or inside each process on the GPU that it trains on.

    renew    before each rollout batch: vLLM takes the network's weights, adapters merged (its `reload_weights`)
    sample   each prompt goes once for all its answers, as token ids; vLLM returns the ids that it has read, which must
             be those of the update, and the log-probability of each sampled token (`engines.vllm_engine`)
    check    at the start, on rows made for it, and on the first rollout batch: vLLM's and the trainer's
             log-probabilities of the sampled tokens agree, which needs equal weights, pixels and positions

To a server the weights go through a folder that the main rank writes; every rank sends its own prompts. Inside the
process they go from tensor to tensor.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors.torch import save_file

from guardreasoner_vl.engines.adapter import adapted_layers
from guardreasoner_vl.engines.model_files import WEIGHTS, check_folder, context_length
from guardreasoner_vl.engines.vllm_engine import VLLMEngine
from guardreasoner_vl.engines.vllm_server import PROCESSED, VLLMServer
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.mining.rollout_io import rollout_request
from guardreasoner_vl.training.grpo.rollouts import roll_out
from guardreasoner_vl.training.grpo.sharding import gather_whole
from guardreasoner_vl.training.model_folder import written
from guardreasoner_vl.types import ModelInfo, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.recipe import GrpoSection
    from guardreasoner_vl.training.grpo.ranks import DistributedContext
    from guardreasoner_vl.training.grpo.rollouts import RolloutGroup

    LogProbabilities = Callable[[Sequence[RolloutGroup]], torch.Tensor]

_SENT = "vllm-weights"
_IMAGES: Mapping[str, Sequence[tuple[int, int]]] = {
    "a text": (),
    "an image": ((224, 168),),
    "two images of unequal size": ((140, 252), (308, 112)),
    "a tiny image": ((28, 28),),
}
"""Sizes (width, height) in pixels of the images in the check's prompts."""
_CHECKED_TOKENS = 16
_MOST_APART = 0.5
"""Mean difference of log-probabilities that bf16 and other kernels never reach: a few hundredths are usual."""
_NEARER = 2.0
"""vLLM has exchanged rows and columns of images if its log-probabilities are this many times nearer to those that the
trainer computes with exchanged positions. With a model that hardly uses positions the ratio is about 1."""


class VLLMSampler:
    """vLLM with the weights of `network`, started from the model folder `model`; `folder` is the stage's.

    Every rank must call `renew` and `check`. Raises `EngineError` if the server cannot be used, `ModelError` if vLLM
    cannot load the model, `MissingExtraError` without vLLM.
    """

    def __init__(
        self,
        network: Any,
        model: Path,
        inputs: QwenInputs,
        section: GrpoSection,
        ranks: DistributedContext,
        folder: Path,
    ) -> None:
        self._network, self._inputs, self._section, self._ranks = network, inputs, section, ranks
        self._sent = folder / _SENT
        self._step: int | None = None
        self._server: VLLMServer | None = None
        if section.rollouts.base_url is not None:
            self._server = VLLMServer(section.rollouts.base_url)
            context = _checked_context(self._server, section)
            self.engine = VLLMEngine(
                self._server,
                inputs,
                ModelInfo(name=str(model)),
                context,
                parameters=dict,
                show=lambda image: image,
                scores=False,
            )
        else:
            self.engine = _in_process(model, section, ranks)

    def renew(self, step: int) -> None:
        """Give vLLM the network's weights, unless it has those of `step` already."""
        if step == self._step:
            return
        weights = present_weights(self._network, torch.float32 if self._section.precision == "fp32" else torch.bfloat16)
        if self._server is None:
            try:
                self.engine.reload(weights_iterator=weights)
            finally:
                deque(weights, maxlen=0)  # should vLLM fail on this rank alone, the others wait for its shares
        else:
            self._send(weights)
        self._step = step

    def check(self, log_probabilities: LogProbabilities) -> None:
        """Sample answers about texts and images of several sizes (`made_up_rows`); compare with the trainer.

        A row that is longer than prompts may be is left out. `log_probabilities` computes the trainer's. Raises
        `EngineError` if vLLM reads other tokens of a prompt, or has other log-probabilities of its answers.
        """
        length = min(_CHECKED_TOKENS, self._section.max_completion_length)
        section = self._section.model_copy(update={"group_size": 2, "max_completion_length": length})
        with self._ranks.all_or_none(), TemporaryDirectory() as images:
            rows = [row for row in made_up_rows(Path(images)) if self._fits(row)]
            groups = roll_out(rows, self.engine, self._inputs, section, "check")
        # Compute all distances before raising an error: ranks that share the weights compute them together.
        distances = [_mean_difference(group, log_probabilities) for group in groups]
        exchanged = [_mean_difference(_exchanged(group), log_probabilities) for group in groups]
        with self._ranks.all_or_none():
            for group, distance, other in zip(groups, distances, exchanged, strict=True):
                check_gap(distance, f"answers to {group.sample.id}")
                if distance > _NEARER * other:
                    raise EngineError(
                        f"vLLM's log-probabilities of its answers to {group.sample.id} are those of an image whose "
                        "rows and columns are exchanged: its positions are not the trainer's; use vllm==0.31"
                    )

    def _fits(self, row: Sample) -> bool:
        room = (self.engine.capabilities.max_context or 0) - self.engine.count_tokens(rollout_request(row))
        return room >= self._section.max_completion_length

    def close(self) -> None:
        """Release vLLM; a server keeps running."""
        self.engine.close()
        if self._server is not None:
            self._server.close()

    def _send(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Write the weights on the main rank and have the server load them; others take part in gathering them."""
        main = self._ranks.main
        tensors = {name: tensor.contiguous().cpu() for name, tensor in weights if main}
        if not main:
            return
        try:
            with written(self._sent):
                shutil.rmtree(self._sent, ignore_errors=True)
                self._sent.mkdir()
                save_file(tensors, self._sent / WEIGHTS)
            self.engine.reload(weights_path=str(self._sent.resolve()))
        finally:
            shutil.rmtree(self._sent, ignore_errors=True)


def present_weights(network: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights as a model folder stores them, whole and with adapters merged; every rank must read to the end."""
    adapted = dict(adapted_layers(network)) if hasattr(network, "peft_config") else {}
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            continue
        tensor = gather_whole(parameter.detach())
        layer, of_base, kind = name.partition(".base_layer.")
        if of_base and kind == "weight":
            tensor = tensor.float() + adapted[layer].get_delta_weight("default").detach().float()
        yield f"{layer}.{kind}" if of_base else name, tensor.to(dtype)


def made_up_rows(folder: Path) -> list[Sample]:
    """The rows of `VLLMSampler.check`; their images are written to `folder`."""
    rows = []
    for name, sizes in _IMAGES.items():
        paths = [folder / f"{name}-{place}.png" for place in range(len(sizes))]
        for path, size in zip(paths, sizes, strict=True):
            Image.linear_gradient("L").rotate(30).resize(size).convert("RGB").save(path)
        rows.append(
            Sample(
                id=name,
                source="made up",
                modality="text-image" if sizes else "text",
                prompt="What is on a kite?",
                images=tuple(map(str, paths)),
                request_label="unharmful",
            )
        )
    return rows


def check_gap(gap: float, answers: str) -> None:
    """Raise `EngineError` if the mean difference of log-probabilities of `answers` cannot come from rounding."""
    if not gap <= _MOST_APART:
        raise EngineError(
            f"vLLM's log-probabilities of its {answers} differ from the trainer's by {gap:.2f} on average: it has "
            "other weights or reads images otherwise; use vllm==0.31"
        )


def _exchanged(group: RolloutGroup) -> RolloutGroup:
    """The group with the positions of rows and columns exchanged; those of text are equal on all axes."""
    prompt = group.prompt
    return replace(group, prompt=replace(prompt, positions=prompt.positions[[0, 2, 1]]))


def _mean_difference(group: RolloutGroup, log_probabilities: LogProbabilities) -> float:
    """The mean difference between vLLM's and the trainer's log-probabilities of a group of two answers."""
    sampled = torch.tensor([value for rollout in group.completions for value in rollout.logprobs])
    with_signal = replace(group, advantages=(1.0, -1.0))  # equal rewards are no reason to skip it
    return float((log_probabilities([with_signal]).cpu() - sampled).abs().mean())


def _checked_context(server: VLLMServer, section: GrpoSection) -> int:
    """The server's context in tokens. Raises `EngineError`, and closes `server`, if it cannot be used."""
    with ExitStack() as failed:
        failed.callback(server.close)
        context = server.checked_context()
        if context <= section.max_completion_length:
            raise EngineError(
                f"the server's context of {context} tokens leaves no room for a prompt beside "
                f"grpo.max_completion_length {section.max_completion_length}: start it with a larger --max-model-len"
            )
        failed.pop_all()
    return context


def _in_process(model: Path, section: GrpoSection, ranks: DistributedContext) -> VLLMEngine:
    """vLLM in this process, on this rank's device."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in a process of its own it could not take tensors
    options: dict[str, Any] = {"distributed_executor_backend": "external_launcher"} if ranks.count > 1 else {}
    wanted = section.max_prompt_length + section.max_completion_length
    return VLLMEngine.load(
        str(model),
        max_model_len=min(wanted, context_length(check_folder(model))),
        gpu_memory_utilization=section.rollouts.gpu_memory_utilization,
        logprobs_mode=PROCESSED,
        **options,
    )
