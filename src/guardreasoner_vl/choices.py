"""The words that settings may be, for the library, the service, recipes and the command line.

Importing this loads no other module of the package, so that `--help` stays instant.
"""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["request", "response"]
"""What a label judges: the prompt with its images, or the assistant's response."""

TARGETS: tuple[Target, ...] = get_args(Target)

Mode = Literal["slow", "fast", "hybrid"]
"""`slow`: reason, then label. `fast`: label at once. `hybrid`: reason only where the fast score is in doubt."""

MODES: tuple[Mode, ...] = get_args(Mode)

Action = Literal["allow", "block"]
"""What happens to content; on an error what `on_error` says."""

Preset = Literal["strict", "balanced", "permissive"]
"""How much a calibrated guard blocks."""

LongInput = Literal["refuse", "windows"]
"""What happens to input that exceeds the model's context: it is refused, or judged in overlapping windows."""

Ocr = Literal["auto", "always", "never"]
"""Whether printed words of images are read before the model judges; `auto`: if the model cannot read them itself."""

EngineName = Literal["auto", "transformers", "openvino", "vllm", "openai"]
"""What runs the model; `auto`: `openai` with an address, else `transformers`."""

ENGINES: tuple[EngineName, ...] = get_args(EngineName)

TeacherName = Literal["rules", "openai"]
"""Who writes reasoning: the offline rules, or a model behind an OpenAI-compatible endpoint."""

ExportLayout = Literal["guardreasoner", "sharegpt"]
"""The authors' three JSON files, or one file for LLaMA-Factory."""

RuleName = Literal["strict", "guardreasoner"]
"""How stored answers are scored: by the protocol's grammar, or as GuardReasoner's code does."""

CHUNK = 128
"""The default number of exchanges that are judged together."""
