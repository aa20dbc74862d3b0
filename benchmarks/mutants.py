"""Mutation testing: mutmut makes one small change to the code that decides, and runs the nearest tests.

    python -m benchmarks.mutants                       40 mutants of each file
    python -m benchmarks.mutants --per-file 0          all of them
    python -m benchmarks.mutants --only rl/reward      of files whose path holds this

`tool.mutmut` in pyproject.toml names the files and the tests. A file with more mutants than that is sampled by
digest: the same code gives the same sample. A survivor is accepted if `mutants.yaml` gives a reason for it; any other
survivor makes the exit status 1. A mutant is identified by file, function and changed text, so that moved
lines do not matter. mutmut leaves out constants at module level, and decorated functions.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FOLDER = Path("mutants")
"""mutmut's working folder, below the root of the repository."""
ACCEPTED = Path(__file__).with_name("mutants.yaml")
PER_FILE = 40
UNSEEN = ("survived", "no tests")


@dataclass(frozen=True, order=True)
class Mutant:
    """`file` is its path below the package; `was` and `becomes` are the changed lines, without indentation."""

    file: str
    function: str
    was: str
    becomes: str

    def as_diff(self) -> str:
        """The mutant as a diff."""
        lines = [f"- {line}" for line in self.was.splitlines()] + [f"+ {line}" for line in self.becomes.splitlines()]
        return "\n".join(f"      {line}" for line in lines)


def mutant_of(file: str, function: str, diff: str) -> Mutant:
    """The mutant of a unified diff."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++", "@@"))]
    was, becomes = ("\n".join(line[1:].strip() for line in lines if line[:1] == sign) for sign in "-+")
    return Mutant(file, function, was, becomes)


def drawn(mutants: Mapping[str, Mutant], most: int) -> list[str]:
    """The keys of at most `most` mutants of each file; 0 draws all."""
    files: dict[str, list[str]] = defaultdict(list)
    for key, mutant in mutants.items():
        files[mutant.file].append(key)
    return [
        key
        for keys in files.values()
        for key in sorted(keys, key=lambda key: (hashlib.sha256(repr(mutants[key]).encode()).digest(), key))[
            : most or None
        ]
    ]


def accepted(path: Path) -> dict[Mutant, str]:
    """The accepted survivors with their reasons. Raises `ValueError` for an entry without a reason."""
    reasons = {}
    for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or ():
        reason = entry.pop("why", "").strip()
        mutant = Mutant(**{name: text.strip() for name, text in entry.items()})
        if not reason:
            raise ValueError(f"{path.name}: {mutant.file}, {mutant.function}: say why it may survive")
        reasons[mutant] = reason
    return reasons


def report(results: Iterable[tuple[Mutant, str]], may: Mapping[Mutant, str], counts: Mapping[str, int]) -> list[Mutant]:
    """Print counts by file, then the survivors; returns those that are not accepted.

    `results` are (mutant, mutmut's status), `counts` has the number of mutants of each file.
    """
    rows: dict[str, list[tuple[Mutant, str]]] = defaultdict(list)
    for mutant, status in results:
        rows[mutant.file].append((mutant, status))
    print(f"{'file':32}{'mutants':>8}{'run':>6}{'killed':>8}{'timeout':>9}{'survived':>10}{'accepted':>10}")
    total = [0] * 6
    for file, run in sorted(rows.items()):
        unseen = [mutant for mutant, status in run if status in UNSEEN]
        late = sum(status == "timeout" for _, status in run)
        numbers = [counts[file], len(run), len(run) - len(unseen) - late, late, len(unseen)]
        numbers.append(sum(mutant in may for mutant in unseen))
        total = [one + more for one, more in zip(total, numbers, strict=True)]
        print(_line(file, numbers))
    print(_line("all", total))
    survivors = sorted({(mutant, status) for run in rows.values() for mutant, status in run if status in UNSEEN})
    for mutant, status in survivors:
        print(f"\n  {mutant.file}, {mutant.function}: {may.get(mutant, f'NOT ACCEPTED, {status}')}\n{mutant.as_diff()}")
    return [mutant for mutant, _ in survivors if mutant not in may]


def _line(name: str, numbers: Sequence[int]) -> str:
    return f"{name:32}" + "".join(
        f"{number:{width}}" for number, width in zip(numbers, (8, 6, 8, 9, 10, 10), strict=True)
    )


def generated(processes: int, only: str) -> dict[str, Mutant]:
    """Write all mutants, and return them by mutmut's key."""
    from mutmut.__main__ import create_mutants
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.utils.file_utils import walk_mutatable_files
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    with redirect_stdout(StringIO()):
        create_mutants(processes)
    mutants: dict[str, Mutant] = {}
    for path in sorted(walk_mutatable_files()):
        file = path.as_posix().partition("guardreasoner_vl/")[2]
        if only not in file:
            continue
        data = SourceFileMutationData(path=path)
        data.load()
        for key in data.exit_code_by_key:
            name, owner = orig_function_and_class_names_from_key(key)
            diff = get_diff_for_mutant(key, path=path)
            mutants[key] = mutant_of(file, f"{owner}.{name}" if owner else name, diff)
    return mutants


def statuses() -> dict[str, str]:
    """mutmut's status of each mutant that was run, by key."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import walk_mutatable_files

    by_key: dict[str, str] = {}
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        by_key |= {key: status_by_exit_code[code] for key, code in data.exit_code_by_key.items() if code is not None}
    return by_key


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every survivor is accepted, 1 if one is not, 2 if mutmut stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-file", type=int, default=PER_FILE, help="0 runs all")
    parser.add_argument("--only", default="", help="files whose path holds this")
    parser.add_argument("--accepted", type=Path, default=ACCEPTED, help="survivors that may be, with their reasons")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    options = parser.parse_args(arguments)
    started, may = time.perf_counter(), accepted(options.accepted)
    shutil.rmtree(FOLDER, ignore_errors=True)
    mutants = generated(options.processes, options.only)
    keys = drawn(mutants, options.per_file)
    log = FOLDER / "run.log"
    print(f"{len(keys):,} of {len(mutants):,} mutants, with {options.processes} processes; {log} tells how far it is")
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", str(options.processes), *keys]
    with log.open("wb") as stream:
        ended = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    known = statuses()
    if ended or set(keys) - known.keys():
        print(
            f"mutmut stopped before the end: see the last lines of {log}; if it failed to collect stats, one of the "
            "tests of tool.mutmut fails without any mutant",
            file=sys.stderr,
        )
        return 2
    counts: dict[str, int] = defaultdict(int)
    for mutant in mutants.values():
        counts[mutant.file] += 1
    missing = report(((mutants[key], known[key]) for key in keys), may, counts)
    gone = [mutant for mutant in may if options.only in mutant.file and mutant not in set(mutants.values())]
    for mutant in gone:
        print(f"\n  {options.accepted.name} has a mutant that is no more, remove it: {mutant.file}, {mutant.function}")
        print(mutant.as_diff())
    print(f"\n{len(missing)} survivors are not accepted; {time.perf_counter() - started:.0f} s")
    return 1 if missing or gone else 0


if __name__ == "__main__":
    sys.exit(main())
