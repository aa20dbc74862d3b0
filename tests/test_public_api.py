"""The public names of `guardreasoner_vl`, and the modules that importing it must not load."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import subprocess
import sys

import pytest

import guardreasoner_vl
from guardreasoner_vl import errors

HEAVY = [
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "trl",
    "vllm",
    "ray",
    "datasets",
    "fastapi",
    "matplotlib",
]
NAMES = [
    "Calibration",
    "DataError",
    "EngineError",
    "Exchange",
    "Guard",
    "GuardClient",
    "GuardError",
    "ImageError",
    "ImageLimits",
    "InputError",
    "InputTooLongError",
    "Judgement",
    "Label",
    "MissingExtraError",
    "ModelError",
    "PixelBudget",
    "Policy",
    "Provenance",
    "RecipeError",
    "RequestCancelledError",
    "Sample",
    "ScriptedEngine",
    "TrackerError",
    "Turn",
    "Verdict",
]


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh interpreter holds after running `code`."""
    script = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stdout))


def test_the_choices_load_no_other_module_of_the_package() -> None:
    loaded = loaded_after("import guardreasoner_vl.choices")
    assert [name for name in loaded if name.startswith("guardreasoner_vl.")] == ["guardreasoner_vl.choices"]
    assert "pydantic" not in loaded


def test_the_public_names() -> None:
    assert guardreasoner_vl.__all__ == NAMES
    assert set(NAMES) <= set(dir(guardreasoner_vl))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_to_a_class_of_that_name(name: str) -> None:
    public = getattr(guardreasoner_vl, name)
    assert inspect.isclass(public)
    assert public.__name__ == name
    assert public.__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Gaurd'"):
        _ = guardreasoner_vl.Gaurd  # a typo on purpose


@pytest.mark.parametrize(
    "code",
    [
        "import guardreasoner_vl",
        "from guardreasoner_vl import Exchange, Label, Verdict, GuardError",
        "import guardreasoner_vl.types, guardreasoner_vl.errors",
        "import guardreasoner_vl.protocol",
    ],
)
def test_importing_loads_nothing_heavy(code: str) -> None:
    modules = loaded_after(code)
    assert "guardreasoner_vl" in modules
    assert not modules.intersection(HEAVY)


def test_importing_the_package_alone_loads_none_of_its_rooms() -> None:
    assert {name for name in loaded_after("import guardreasoner_vl") if name.startswith("guardreasoner_vl.")} == set()


def test_every_error_is_public_and_has_its_own_code() -> None:
    classes = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    tree: list[type[errors.GuardError]] = [kind for kind in classes if issubclass(kind, errors.GuardError)]
    assert tree == classes
    assert {kind.__name__ for kind in tree} == {name for name in NAMES if name.endswith("Error")}
    assert len({kind.code for kind in tree}) == len(tree)
    assert issubclass(errors.ImageError, errors.InputError)
    assert issubclass(errors.InputTooLongError, errors.InputError)


def test_a_missing_extra_says_what_to_install() -> None:
    said = "peft is not installed: install guardreasoner-vl with the extra 'train' (README, Install)"
    assert str(errors.MissingExtraError("peft", "train")) == said


def test_version_is_the_distributions() -> None:
    assert importlib.metadata.version("guardreasoner-vl") == guardreasoner_vl.__version__
