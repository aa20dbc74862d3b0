"""`make mutants`: which mutants are drawn, which survivors are accepted, and that mutmut does see what no test sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutants import ACCEPTED, Mutant, accepted, drawn, mutant_of, report

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
DIFF = """--- src/guardreasoner_vl/rl/loss.py
+++ src/guardreasoner_vl/rl/loss.py
@@ -1,4 +1,4 @@
 def clipped(ratio, bound):
     with no_grad():
-        return ratio > 1 + bound
+        return ratio >= 1 + bound
"""
LOSS = Mutant("rl/loss.py", "clipped", "return ratio > 1 + bound", "return ratio >= 1 + bound")


def many(file: str, count: int) -> dict[str, Mutant]:
    return {f"{file}.x_f__mutmut_{at}": Mutant(file, "f", f"a = {at}", f"a = {at + 1}") for at in range(count)}


def test_a_mutant_is_known_by_what_changed_and_not_where() -> None:
    assert mutant_of("rl/loss.py", "clipped", DIFF) == LOSS
    moved = DIFF.replace("@@ -1,4 +1,4 @@", "@@ -7,4 +7,4 @@").replace("        return", "    return")
    assert mutant_of("rl/loss.py", "clipped", moved) == LOSS


def test_each_file_is_drawn_from_alike_whatever_the_order() -> None:
    mutants_by_key = {**many("a.py", 9), **many("b.py", 2)}
    keys = drawn(mutants_by_key, 4)
    assert [mutants_by_key[key].file for key in keys] == ["a.py"] * 4 + ["b.py"] * 2
    assert set(drawn(dict(reversed(mutants_by_key.items())), 4)) == set(keys)
    assert set(drawn(mutants_by_key, 3)) < set(keys)
    assert set(drawn(mutants_by_key, 0)) == set(mutants_by_key)


def test_a_file_that_grows_keeps_most_of_its_draw() -> None:
    before, after = set(drawn(many("a.py", 100), 20)), set(drawn(many("a.py", 105), 20))
    assert len(before & after) >= 15


def test_the_survivors_that_may_be_have_reasons() -> None:
    assert all(accepted(ACCEPTED).values())


def test_a_survivor_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.yaml"
    path.write_text("- {file: rl/loss.py, function: clipped, was: a, becomes: b, why: ' '}\n", "utf-8")
    with pytest.raises(ValueError, match=r"some\.yaml: rl/loss\.py, clipped: say why"):
        accepted(path)


def test_the_report_counts_by_file_and_names_survivors(capsys: pytest.CaptureFixture[str]) -> None:
    other = Mutant("rl/loss.py", "clipped", "a", "b")
    results = [(LOSS, "survived"), (other, "killed"), (Mutant("x.py", "f", "c", "d"), "timeout")]
    assert report(results, {}, {"rl/loss.py": 5, "x.py": 1}) == [LOSS]
    text = capsys.readouterr().out
    counts = {line.split()[0]: [int(word) for word in line.split()[1:]] for line in text.splitlines()[1:4]}
    assert counts == {"rl/loss.py": [5, 2, 1, 0, 1, 0], "x.py": [1, 1, 0, 1, 0, 0], "all": [6, 3, 1, 1, 1, 0]}
    assert "rl/loss.py, clipped: NOT ACCEPTED" in text
    assert "      - return ratio > 1 + bound\n      + return ratio >= 1 + bound\n" in text
    assert report(results, {LOSS: "equal"}, {"rl/loss.py": 5, "x.py": 1}) == []
    assert "rl/loss.py, clipped: equal" in capsys.readouterr().out


EDGE = "{file: toy.py, function: is_large, was: return size > 10, becomes: return size >= 10, why: ours}"
GONE = "{file: toy.py, function: is_large, was: return size > 12, becomes: return size > 13, why: ours}"
PROJECT = {
    "pyproject.toml": '[tool.mutmut]\nsource_paths = ["src"]\nonly_mutate = ["src/guardreasoner_vl/toy.py"]\n'
    'pytest_add_cli_args_test_selection = ["tests"]\nprocess_isolation = "forkserver"\n',
    "src/guardreasoner_vl/__init__.py": "",
    "src/guardreasoner_vl/toy.py": "def is_large(size: int) -> bool:\n    return size > 10\n",
    "tests/test_toy.py": "from guardreasoner_vl.toy import is_large\n\n\n"
    "def test_sizes() -> None:\n    assert (is_large(9), is_large(99)) == (False, True)\n",
    "may.yaml": f"[{EDGE}, {GONE}]",
}


def test_what_no_test_sees_is_found(tmp_path: Path) -> None:
    """The sizes 10 and 11 are never asked about: two survivors, of which one is accepted."""
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    command = [sys.executable, "-m", "benchmarks.mutants", "--processes", "1", "--accepted", "may.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is_large: ours\n      - return size > 10\n      + return size >= 10\n" in done.stdout
    assert "is_large: NOT ACCEPTED, survived\n      - return size > 10\n      + return size > 11\n" in done.stdout
    assert "may.yaml has a mutant that is no more, remove it: toy.py, is_large" in done.stdout
    assert "\n1 survivors are not accepted" in done.stdout


def test_a_run_that_stopped_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess([], 0)

    folder = tmp_path / "mutants"

    def made(*_: object) -> dict[str, Mutant]:
        folder.mkdir()
        return {"k": LOSS}

    monkeypatch.setattr(mutants, "FOLDER", folder)
    monkeypatch.setattr(mutants, "generated", made)
    monkeypatch.setattr(mutants, "statuses", dict)
    monkeypatch.setattr(subprocess, "run", stopped)
    assert mutants.main([]) == 2
    assert "mutmut stopped before the end" in capsys.readouterr().err
