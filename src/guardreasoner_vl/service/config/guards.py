"""The settings of the guards, and of what is done with their verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from guardreasoner_vl.choices import Action, LongInput, Mode, Ocr, Preset
from guardreasoner_vl.judging.calibration import read_calibration
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.types import Frozen

DEFAULT = "default"
"""The guard that judges if a request names none."""


class GuardSection(Frozen):
    """One guard: its model, and what decides its verdicts (`judging.policy.Policy`)."""

    model: str = Field(
        default="embedded",
        description="`embedded`, a model folder, a hub id, or the name that the server at `base_url` gives the model.",
    )
    revision: str | None = Field(default=None, description="Commit or tag of a hub id. Null: the default branch.")
    engine: Literal["auto", "transformers", "openvino", "openai"] = Field(
        default="auto",
        description="`transformers`: run the model here, in a process of its own. `openvino`: the same, faster on a "
        "CPU (extra `openvino`). `openai`: ask an OpenAI-compatible server. `auto`: a server if `base_url` is set, "
        "else `transformers`.",
    )
    base_url: str | None = Field(
        default=None, description="Address of the model's server, such as http://localhost:8000/v1. Null: no server."
    )
    api_key: SecretStr | None = Field(
        default=None, description="Key for the model's server. Null: OPENAI_API_KEY, if that is set."
    )
    mode: Mode = Field(
        default="slow",
        description="`slow`: reason first. `fast`: give the verdict only. `hybrid`: reason where the fast score lies "
        "in the band. A request may ask for another mode.",
    )
    thresholds: tuple[float | None, float | None] = Field(
        default=(None, None),
        description="Lowest P(harmful) at which the request and the response count as harmful. Null: what the "
        "calibration's `preset` says, or the label without a calibration.",
    )
    calibration: Path | Literal["none"] | None = Field(
        default=None,
        description="File that `calibrate` wrote. Null: the one in the model's folder, if any. `none`: no calibration.",
    )
    preset: Preset = Field(
        default="balanced",
        description="The calibration's thresholds to use: `strict` aims at 10% false positives, `balanced` at 5%, "
        "`permissive` at 1%.",
    )
    band: tuple[float, float] | None = Field(
        default=None,
        description="Scores, lowest and highest, that `hybrid` mode reasons about. Null: the calibration's band, else "
        "0.1 to 0.9. [0, 1] always reasons.",
    )
    max_new_tokens: int = Field(default=1024, description="Longest answer of the model in tokens.")
    retry_new_tokens: int = Field(
        default=4096,
        description="Longest answer in tokens of the one retry after an answer was cut. Not above `max_new_tokens`: no "
        "retry.",
    )
    long_input: LongInput = Field(
        default="windows",
        description="What to do with an exchange that exceeds the model's context: `refuse` it, or judge overlapping "
        "`windows` and take the worst verdict.",
    )
    ocr: Ocr = Field(
        default="auto",
        description="Whether the words printed in images are read before the model judges: `auto`, for a model that "
        "does not read them itself, such as the embedded guard, `always` or `never`.",
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.engine == "openai" and not self.base_url:
            raise ValueError("engine openai needs a base_url")
        if self.engine not in ("auto", "openai") and self.base_url:
            raise ValueError("a base_url needs engine openai")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether another server runs the model."""
        return self.base_url is not None

    @property
    def policy(self) -> Policy:
        """The guard's policy. Raises `InputError` for an impossible value."""
        return Policy(
            mode=self.mode,
            thresholds=self.thresholds,
            band=self.band,
            calibration=read_calibration(self.calibration) if isinstance(self.calibration, Path) else None,
            folder_calibration=self.calibration is None,
            preset=self.preset,
            max_new_tokens=self.max_new_tokens,
            retry_new_tokens=self.retry_new_tokens,
            long_input=self.long_input,
            ocr=self.ocr,
        )


class EnforcementSection(Frozen):
    """What is done about harmful requests, or about harmful responses."""

    renamed_keys: ClassVar[dict[str, str]] = {"use": "mode"}

    mode: Literal["enforce", "monitor"] = Field(
        default="enforce",
        description="`enforce`: block what is harmful. `monitor`: judge and count it, and let everything pass.",
    )
    on_error: Action = Field(
        default="block",
        description="What to do with what could not be judged. `allow` fails open where the guard is at fault "
        "(`engine`, `engine_gone`, `engine_down`, `auth`, `queue_full`): each exchange let through is counted and "
        "logged as critical. Errors that the author of an exchange can cause block.",
    )
