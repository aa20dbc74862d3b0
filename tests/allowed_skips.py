"""`--allowed-skips FILE`: a run fails if it skips tests that the file does not list, so that no skip goes unnoticed.

A line of the file is `how many at most | file of the test | reason`, where file and reason may hold `*`; what follows a
`#` is a remark.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _pytest.terminal import TerminalReporter

Skip = tuple[str, str]
"""Where, and why."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", metavar="FILE", type=Path, help="fail if other tests are skipped, or more")


def pytest_sessionfinish(session: pytest.Session) -> None:
    excess = _excess(session.config)
    if excess and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    for skip in _excess(config):
        terminalreporter.write_line(f"not allowed to be skipped: {skip}", red=True)


def _excess(config: pytest.Config) -> list[str]:
    """The skips beyond the list; empty in a worker, which runs only a part of the tests."""
    path: Path | None = config.getoption("--allowed-skips")
    reporter: TerminalReporter | None = config.pluginmanager.get_plugin("terminalreporter")
    if path is None or reporter is None or hasattr(config, "workerinput"):
        return []
    return beyond(
        path.read_text("utf-8"), [_skip(report, config.rootpath) for report in reporter.getreports("skipped")]
    )


def _skip(report: pytest.TestReport | pytest.CollectReport, root: Path) -> Skip:
    place, reason = report.nodeid.partition("::")[0], str(report.longrepr)
    if isinstance(report.longrepr, tuple):
        path, _, reason = report.longrepr
        place = Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else str(path)
    return place, reason.removeprefix("Skipped: ")


def beyond(listed: str, skips: Iterable[Skip]) -> list[str]:
    """One line for each place and reason that the list lacks, or has less often. Raises `ValueError` for a bad line."""
    rules = []
    for line in listed.splitlines():
        if rule := line.partition("#")[0].strip():
            most, places, reason = (field.strip() for field in rule.split("|", 2))
            rules.append((int(most), places, reason))
    used: Counter[int] = Counter()
    excess: Counter[Skip] = Counter()
    for place, why in skips:
        matching = (
            number
            for number, (most, places, reason) in enumerate(rules)
            if used[number] < most and fnmatchcase(place, places) and fnmatchcase(why, reason)
        )
        number = next(matching, None)
        if number is None:
            excess[place, why] += 1
        else:
            used[number] += 1
    return [f"{place}: {why} ({times} more than the list allows)" for (place, why), times in excess.items()]
