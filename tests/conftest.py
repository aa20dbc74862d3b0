"""Fixtures that several packages of tests share."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest

from tests.allowed_skips import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.engines.qwen import QwenInputs

__all__ = ["inputs", "pytest_addoption", "pytest_sessionfinish", "pytest_terminal_summary", "tiny_model"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_SLOW_AS_A_WHOLE = re.compile(r"^pytestmark = (\[\s*)?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without slow tests, leave out modules that have no others: importing them would take longer than many tests."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return True if _SLOW_AS_A_WHOLE.search(collection_path.read_text("utf-8")) else None


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen2.5-VL with random weights; read it only."""
    from tests.tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def int8_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its matrices in int8; read it only."""
    from guardreasoner_vl.training.compact import compact

    folder = tmp_path_factory.mktemp("compact") / "small"
    compact(tiny_model, folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tiny_model: Path) -> QwenInputs:
    """Encodes for the tiny model; read it only."""
    from guardreasoner_vl.engines.qwen import QwenInputs

    return QwenInputs.from_folder(tiny_model)
