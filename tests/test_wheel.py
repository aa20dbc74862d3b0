"""The wheel contains every file of the package, is small enough to publish, and works where it alone is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from guardreasoner_vl import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MOST_BYTES = 95_000_000
"""Package indexes take files of up to 100 MB."""


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network, by the hatchling of this environment."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    [path] = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def required(distribution: Distribution) -> Iterator[Distribution]:
    """The distributions that one needs without extras, and those that they need."""
    for text in distribution.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield Distribution.from_name(requirement.name)


@pytest.fixture(scope="module")
def dependencies(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to what the wheel requires, so that no other package of this environment can be imported."""
    [wheel] = distributions(path=[str(target)])
    needed: dict[str, Distribution] = {}
    waiting = [*required(wheel)]
    while waiting:
        distribution = waiting.pop()
        if distribution.name not in needed:
            needed[distribution.name] = distribution
            waiting += required(distribution)
    folder = tmp_path_factory.mktemp("dependencies")
    for distribution in needed.values():
        for name in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            link = folder / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))))
    return folder


def python(target: Path, dependencies: Path, folder: Path, *arguments: str | Path) -> str:
    """The output of Python in `folder`, with the installed wheel and what it requires; `-S` leaves out all else."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (target, dependencies)))}
    command = [sys.executable, "-S", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    files = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    for folder, place in (("recipes", "recipe/shipped"), ("examples/integrations", "integrations/examples")):
        paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in {".yaml", ".yml", ".py", ".co"})
        files |= {f"guardreasoner_vl/{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in paths}
    assert names == files
    for kind in ("model.int8.safetensors", "tokenizer.json", "instruction.txt", "page.html", "f1.csv", "py.typed"):
        assert any(name.endswith(f"/{kind}") for name in names), kind
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE"} <= metadata


def test_the_wheel_fits_into_a_package_index(wheel: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES


def test_the_installed_command_plans_a_shipped_recipe(target: Path, dependencies: Path, tmp_path: Path) -> None:
    run = partial(python, target, dependencies, tmp_path)
    module = run("-c", "import guardreasoner_vl; print(guardreasoner_vl.__file__)")
    assert Path(module.strip()).is_relative_to(target)
    command = target / "bin" / "guardreasoner-vl"
    assert __version__ in run(command, "--version")
    assert run(command, "run", "smoke", "--out", "runs", "--plan").startswith("recipe smoke, ")


def test_nothing_but_the_requirements_can_be_imported(target: Path, dependencies: Path, tmp_path: Path) -> None:
    search = "from importlib.util import find_spec; print([find_spec(name) is None for name in ('torch', 'pytest')])"
    assert python(target, dependencies, tmp_path, "-c", search).strip() == "[False, True]"


def test_the_installed_guard_judges(target: Path, dependencies: Path, tmp_path: Path) -> None:
    asked = ("moderate", "--prompt", "How do I bake bread?", "--mode", "fast", "--json")
    verdict = json.loads(python(target, dependencies, tmp_path, target / "bin" / "guardreasoner-vl", *asked))
    assert (verdict["model"]["name"], verdict["error"]) == ("embedded", None)
