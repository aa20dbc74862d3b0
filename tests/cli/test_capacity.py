"""`plan-capacity`: what it prints, what it refuses, and that the page on scaling holds its output."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from guardreasoner_vl.cli import app as cli
from guardreasoner_vl.cli.errors import ERROR, OK
from guardreasoner_vl.pipeline.capacity import DEVICES

if TYPE_CHECKING:
    from typer.testing import Result

    from guardreasoner_vl.pipeline.capacity import Device

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BLOCKS = re.findall(
    r"^```console\n\$ guardreasoner-vl (plan-capacity [^\n]*)\n(.*?)^```$", PAGE.read_text(), re.S | re.M
)


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_the_page_has_tables() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize(("command", "output"), BLOCKS)
def test_the_tables_of_the_page_are_what_the_command_prints(command: str, output: str) -> None:
    result = invoke(*shlex.split(command))
    assert (result.exit_code, result.stdout) == (OK, output)


@pytest.mark.parametrize(("name", "device"), DEVICES.items())
def test_the_page_names_the_source_of_each_gpu(name: str, device: Device) -> None:
    figures = f"{device.flops / 1e12:g} | {device.bandwidth / 1e9:,.0f} | {device.memory / 1e9:.0f}"
    assert f"| `{name}` | {figures} | {device.source} |" in PAGE.read_text()


def test_a_price_gives_the_cost() -> None:
    # 1 TFLOP/s and the memory for one request at a time; a GPU costs 24 x 2 USD a day.
    result = invoke("plan-capacity", "3b", "--per-day", 10, "--gpu", "100,1000,24", "--price", 2)
    *_, row = (cells.strip() for cells in result.stdout.splitlines()[-1].strip("|").split("|"))
    assert "| 48.00 | 4,800,000.00 |" in result.stdout
    assert row == "4,800,000.00"


def test_a_model_that_does_not_fit_is_said() -> None:
    result = invoke("plan-capacity", "7b", "--per-day", 10, "--gpu", "100,1000,16")
    assert "| 100,1000,16 | does not fit |" in result.stdout


def test_a_folder_gives_its_own_shape(tiny_model: Path) -> None:
    result = invoke("plan-capacity", tiny_model, "--per-day", 10, "--gpu", "l4")
    assert (result.exit_code, "0.00 B weights" in result.stdout) == (OK, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["13b", "--per-day", "10"], "13b: no such folder"),
        (["3b", "--per-day", "10", "--price", "2"], "give exactly one --gpu"),
        (["3b", "--per-day", "10", "--gpu", "h101"], "is no known GPU"),
        (["3b", "--per-day", "10", "--prompt-tokens", "100"], "118 of 100 prompt tokens are cached"),
        (["3b"], "--per-day"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str) -> None:
    result = invoke("plan-capacity", *arguments)
    assert (result.exit_code, said in result.stderr) == (ERROR, True)
    assert len(result.stderr.splitlines()) == 1
