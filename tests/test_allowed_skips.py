"""The limit on skipped tests in CI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.allowed_skips import beyond

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
HOOKS = "from tests.allowed_skips import pytest_addoption, pytest_sessionfinish, pytest_terminal_summary\n"
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="no browser")
def test_a(): pass

@pytest.mark.parametrize("n", [1, 2])
def test_b(n): pytest.skip("no engine")

@pytest.mark.xfail(reason="known")
def test_c(): assert False

def test_d(): pass
"""
MODULE = 'import pytest\npytest.importorskip("no_such_module", reason="no library")\n'
ALL = "1 | test_x.py | no browser\n2 | test_x.py | no engine\n1 | test_y.py | no library\n"


def run(folder: Path, listed: str, *options: str) -> subprocess.CompletedProcess[str]:
    for name, text in {"conftest.py": HOOKS, "test_x.py": TESTS, "test_y.py": MODULE, "allowed": listed}.items():
        (folder / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--allowed-skips", "allowed", *options]
    alone = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False)


WAYS = [(), ("-p", "xdist", "-n", "2")]
"""In one process, and as CI does it."""


@pytest.mark.parametrize("options", WAYS)
def test_a_run_that_skips_no_more_passes(tmp_path: Path, options: Sequence[str]) -> None:
    done = run(tmp_path, ALL, *options)
    assert done.returncode == 0, done.stdout
    assert "1 passed, 4 skipped, 1 xfailed" in done.stdout
    assert "not allowed" not in done.stdout


@pytest.mark.parametrize("options", WAYS)
def test_a_run_that_skips_more_fails_and_names_it(tmp_path: Path, options: Sequence[str]) -> None:
    done = run(tmp_path, "1 | test_x.py | another reason\n1 | test_x.py | no engine\n", *options)
    assert done.returncode == 1, done.stdout
    for named in ("test_x.py: no browser", "test_x.py: no engine", "test_y.py: no library"):
        assert f"not allowed to be skipped: {named} (1 more than the list allows)" in done.stdout
    assert "1 passed" in done.stdout.splitlines()[-1]


def test_a_failure_stays_what_it_is(tmp_path: Path) -> None:
    assert run(tmp_path, "", "-k", "nothing_of_that_name").returncode == 5


def test_patterns_and_remarks() -> None:
    listed = "# all of these\n2 | tests/a_*.py | lacks *  # for now\n"
    skips = [("tests/a_1.py", "lacks x"), ("tests/a_2.py", "lacks y"), ("tests/a_2.py", "lacks y"), ("b.py", "lacks x")]
    assert [line.partition(" (")[0] for line in beyond(listed, skips)] == ["tests/a_2.py: lacks y", "b.py: lacks x"]
    with pytest.raises(ValueError, match="values"):
        beyond("2 | tests", [])


def test_the_list_of_ci_is_readable_and_small() -> None:
    listed = (ROOT / ".ci" / "allowed-skips").read_text("utf-8")
    assert beyond(listed, []) == []
    assert beyond(listed, [("tests/service/test_page.py", "the page is not tried in a browser: install chromium")])
    assert beyond(listed, [("tests/test_container.py", "hadolint is not installed")])
