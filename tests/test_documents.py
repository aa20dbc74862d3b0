"""What the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence.md"
_NAMED = re.compile(r"`((?:tests/)?[\w/]+\.py)?((?:::\w+)*)`")


def named_tests() -> list[tuple[str, str]]:
    """File and function of each test in the evidence; a name without a file belongs to the file before it."""
    named: list[tuple[str, str]] = []
    for line in EVIDENCE.read_text("utf-8").splitlines():
        file = ""
        for path, functions in _NAMED.findall(line):
            file = path or file
            if functions and file.startswith("tests/"):
                named.append((file, functions.rpartition("::")[2]))
    return named


def test_the_tests_that_the_evidence_names_are_there() -> None:
    named = named_tests()
    assert len(named) > 150
    missing = [
        (file, function)
        for file, function in named
        if not (ROOT / file).is_file()
        or not re.search(rf"^ *(async )?(def|class) {function}\b", (ROOT / file).read_text("utf-8"), re.MULTILINE)
    ]
    assert missing == []


def test_every_file_that_the_evidence_names_is_there() -> None:
    paths = re.findall(r"`(tests/[\w/]+\.py)", EVIDENCE.read_text("utf-8"))
    assert [path for path in paths if not (ROOT / path).is_file()] == []
