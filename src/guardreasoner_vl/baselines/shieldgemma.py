"""ShieldGemma 2, run in this process with transformers: judges each image by each policy; the worst answer counts.

Its processor builds the prompts that it was trained with; its answer is the probability of *Yes* (the image violates
the policy) against *No*. It ignores the request's text and the response. Source: the model's card
(google/shieldgemma-2-4b-it) and arXiv 2504.01081.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import AutoProcessor, ShieldGemma2ForImageClassification

from guardreasoner_vl.baselines.base import UnsupportedError, judgement_of
from guardreasoner_vl.baselines.client import LOCAL
from guardreasoner_vl.baselines.verdicts import verdict_of
from guardreasoner_vl.engines.model_files import model_info, resolve_folder
from guardreasoner_vl.errors import EngineError, GuardError, ModelError
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.types import CheckedImage, Usage, failed_verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from guardreasoner_vl.types import Exchange, Mode, ModelInfo, Verdict

EVEN = 0.5
"""An image is harmful if the probability of *Yes* exceeds this for any policy."""

YES = 0
"""The column of *Yes* in the model's probabilities, of shape (images x policies, 2)."""


class ShieldGemma2:
    """Runs ShieldGemma 2 from a local folder or a hub id with safetensors weights. Raises `ModelError`."""

    mode: Mode = "fast"

    def __init__(self, model: str) -> None:
        folder = resolve_folder(model)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
            network = ShieldGemma2ForImageClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype="auto"
            )
            self._policies = dict(self._processor.policy_definitions)
        except (OSError, ValueError, AttributeError) as error:
            raise ModelError(
                f"{folder}: cannot be loaded as ShieldGemma 2; give the folder of a complete model"
            ) from error
        self._network: Any = network.to(self._device).eval()
        self._info = model_info(model, folder)

    @property
    def model(self) -> ModelInfo:
        """The model's name and revision."""
        return self._info

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect verdicts, besides the model and the mode."""
        return {"adapter": LOCAL, "policies": self._policies}

    def moderate_batch(self, items: Iterable[Exchange], *, chunk: int = 128) -> Iterator[Verdict]:  # noqa: ARG002
        """Yield verdicts in order, one exchange at a time; an exchange without an image gets an `error` verdict."""
        return map(self._verdict, items)

    def close(self) -> None:
        """Free the model."""
        self._network = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _verdict(self, exchange: Exchange) -> Verdict:
        started = time.perf_counter()
        try:
            score = self._score(
                [image for image in checked_exchange(exchange)[0].images if isinstance(image, CheckedImage)]
            )
        except GuardError as error:
            return failed_verdict(error.code, str(error), self.mode, self.model, _since(started))
        return verdict_of({"request": judgement_of(score > EVEN, score)}, self.mode, self.model, _since(started))

    def _score(self, images: Sequence[CheckedImage]) -> float:
        """The highest probability of *Yes* over all images and policies."""
        if not images:
            raise UnsupportedError("ShieldGemma 2 judges only images; the exchange has none")
        try:
            opened = [image.open() for image in images]
            inputs = self._processor(images=opened, return_tensors="pt").to(self._device)
            with torch.inference_mode():
                probabilities = self._network(**inputs).probabilities
        except Exception as error:
            raise EngineError(
                f"ShieldGemma 2 failed ({type(error).__name__}); try again, or send fewer images"
            ) from error
        score = float(probabilities[:, YES].float().max())
        if not 0 <= score <= 1:
            raise EngineError("ShieldGemma 2 returned no valid probability; load it in another precision")
        return score


def _since(started: float) -> Usage:
    return Usage(completion_tokens=1, seconds=time.perf_counter() - started)
