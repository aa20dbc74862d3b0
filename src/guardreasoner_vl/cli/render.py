"""Output of the commands: verdicts and summaries as text, in which no input can act as a terminal command."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from rich.text import Text

from guardreasoner_vl.types import Label

if TYPE_CHECKING:
    from collections.abc import Mapping

    from guardreasoner_vl.batch.moderate import BatchSummary
    from guardreasoner_vl.types import Judgement, Usage, Verdict

_COLOURS = {Label.HARMFUL: "bold red", Label.UNHARMFUL: "green", Label.ERROR: "bold yellow"}
_KEPT = "\n\t\u200c\u200d"  # the joiners shape Persian, Hindi and emoji
_SHOWN = 5


def printable(text: str, kept: str = _KEPT) -> str:
    """`text` with control, direction and other invisible characters escaped, such as `\\x1b`."""
    return "".join(character if character in kept or _visible(character) else _escaped(character) for character in text)


def one_line(text: str) -> str:
    """`text` as one printable line."""
    return printable(" ".join(text.split()), kept="\u200c\u200d")


def verdict_text(verdict: Verdict, show_reasoning: bool) -> Text:
    """A verdict as text: action, both labels with their scores, reasoning, model, tokens and seconds."""
    text = Text()
    text.append(f"{verdict.action}\n", "bold white on red" if verdict.action == "block" else "bold white on green")
    for name, judged in (("request", verdict.request), ("response", verdict.response)):
        text.append(f"  {name:<10}")
        text.append(_judgement_text(judged), _COLOURS.get(judged.label, "dim"))
        text.append("\n")
    if show_reasoning and verdict.reasoning:
        text.append(f"\n{printable(verdict.reasoning.strip())}\n\n")
    model = f"{verdict.model.name} ({verdict.model.revision})" if verdict.model.revision else verdict.model.name
    text.append(
        f"  {one_line(model)}, {verdict.mode}, {_tokens_text(verdict.usage)}, {verdict.usage.seconds:.2f} s", "dim"
    )
    return text


def summary_text(summary: BatchSummary, rejected_file: str) -> Text:
    """The summary of a batch, with rejected lines and rows to judge again."""
    text = Text()
    resumed = f", {summary.resumed:,} earlier" if summary.resumed else ""
    text.append(f"judged {summary.judged:,} rows{resumed}\n", "bold")
    for name, counts in (
        ("action", summary.tally.actions),
        ("request", summary.tally.requests),
        ("response", summary.tally.responses),
    ):
        if counts:
            text.append(f"  {name:<9}{_counts_line(counts)}\n")
    text.append(f"  used     {_tokens_text(summary.usage)}\n")
    rate = f", {summary.per_second:.1f} moderations/s" if summary.judged else ""
    text.append(f"  time     {summary.seconds:.1f} s{rate}")
    if summary.ignored:
        names = ", ".join(one_line(name)[:40] for name in summary.ignored[:_SHOWN])
        more = f" and {len(summary.ignored) - _SHOWN} more" if len(summary.ignored) > _SHOWN else ""
        text.append(f"\n  not judged: the fields {names}{more}", "yellow")
    if summary.tally.errors:
        text.append(
            f"\n  errors   {_counts_line(summary.tally.errors)}; the next run judges these rows again", "yellow"
        )
    if summary.rejected:
        text.append(f"\n  rejected {len(summary.rejected):,} lines, listed in {one_line(rejected_file)}", "yellow")
    for rejected in summary.rejected[:_SHOWN]:
        text.append(f"\n    line {rejected.line}: {one_line(rejected.reason)}", "yellow")
    return text


def counts_text(title: str, counts: Mapping[str, int]) -> Text:
    """One line of counts, the largest first."""
    return Text(f"{title}: {_counts_line(counts)}")


def _judgement_text(judged: Judgement) -> str:
    label = judged.label.replace("_", " ")
    return label if judged.score is None else f"{label} (harmful with p = {judged.score:.3f})"


def _tokens_text(usage: Usage) -> str:
    cached = f" ({usage.cached_tokens:,} cached)" if usage.cached_tokens else ""
    return f"{usage.prompt_tokens:,} tokens in{cached}, {usage.completion_tokens:,} out"


def _counts_line(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{one_line(name)} {count:,}" for name, count in ordered)


def _visible(character: str) -> bool:
    return unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
