"""What a guard is worth in each language: held-out requests and remarks of the sets that name a row's language.

    python -m benchmarks.languages --data DIR

DIR is laid out as for `benchmarks.quality`. The sets are small: a language has some ten rows of each kind.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quality.sets import held_out
from guardreasoner_vl.choices import ENGINES, MODES
from guardreasoner_vl.cli.terminal import be_quiet
from guardreasoner_vl.errors import DataError, GuardError
from guardreasoner_vl.guard import Guard
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from guardreasoner_vl.types import Sample, Verdict

NAMES = {
    "arabic": "ar",
    "chinese": "zh",
    "dutch": "nl",
    "english": "en",
    "french": "fr",
    "german": "de",
    "hindi": "hi",
    "italian": "it",
    "latin": "la",
    "mandarin": "zh",
    "polish": "pl",
    "portuguese": "pt",
    "russian": "ru",
    "spanish": "es",
}
"""Codes of the languages that a set names in full."""

KINDS = {
    ("request", "harmful"): "harmful requests let through",
    ("request", "unharmful"): "harmless requests blocked",
    ("remark", "harmful"): "toxic remarks let through",
    ("remark", "unharmful"): "other remarks blocked",
}


def language_of(row: Sample) -> str | None:
    """The row's language as a code, None if its set does not say."""
    name = row.meta.get("lang") or row.meta.get("language")
    return NAMES.get(name.lower(), name) if isinstance(name, str) else None


def wrong_by_language(rows: Iterable[tuple[Sample, Verdict]]) -> Mapping[str, Mapping[tuple[str, str], str]]:
    """For each language and kind of row, "wrong of all"; a verdict that is an error counts as wrong."""
    counts: dict[str, dict[tuple[str, str], Counter[bool]]] = defaultdict(lambda: defaultdict(Counter))
    for row, verdict in rows:
        language = language_of(row)
        if language and row.request_label:
            kind = "remark" if row.provenance.task == "toxicity" else "request"
            wrong = verdict.request.label != Label(row.request_label)
            counts[language][kind, row.request_label][wrong] += 1
    return {
        language: {kind: f"{count[True]} of {count.total()}" for kind, count in kinds.items()}
        for language, kinds in sorted(counts.items())
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser("python -m benchmarks.languages", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the public sets")
    parser.add_argument("--model", default="embedded", help="'embedded', a model folder or a hub id")
    parser.add_argument("--engine", default="auto", choices=ENGINES, help="what runs it")
    parser.add_argument("--mode", default="fast", choices=MODES, help="in which mode it is asked")
    options = parser.parse_args(arguments)
    be_quiet()
    try:
        rows = [row for row in held_out(options.data) if language_of(row) and not row.response]
        if not rows:
            raise DataError(f"{options.data}: no held-out row names its language; give the folder of the data sets")
        with Guard.load(options.model, options.engine, policy=Policy(mode=options.mode)) as guard:
            print(f"{guard.model.name} ({guard.model.revision}), {options.mode}, {len(rows)} rows")
            wrong = wrong_by_language(zip(rows, guard.moderate_batch(row.exchange() for row in rows), strict=True))
    except GuardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n| language | {' | '.join(KINDS.values())} |\n|{'---|' * (len(KINDS) + 1)}")
    for language, kinds in wrong.items():
        print(f"| {language} | {' | '.join(kinds.get(kind, '–') for kind in KINDS)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
