"""Surface variations of training texts: the meaning and the labels stay the same.

The seed and the row's id decide whether and how a row is changed, so that neither depends on its labels. There are more
kinds than in `evaluation.perturbations`, which measures a guard's robustness to such changes, and no shared code. The
neutraliser undoes none of them: it breaks markers and lets invisible and odd letters through.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from guardreasoner_vl.protocol.lookalikes import LOOKALIKES
from guardreasoner_vl.sources.checked import marks_fault
from guardreasoner_vl.sources.jsonl import never_held_out
from guardreasoner_vl.sources.repeats import times, with_count
from guardreasoner_vl.types import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.recipe import VariedSection
    from guardreasoner_vl.types import Sample, Target

Change: TypeAlias = Callable[[str, random.Random], str]

BRIEF = 1500
"""Longest text, in characters, for the changes that cost several tokens a letter."""

INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
"""Zero-width space, non-joiner and joiner, word joiner, byte order mark, soft hyphen."""

LEET = dict(zip("abegiostzABEGIOSTZ", "483910572483910572", strict=True))
FULL_WIDTH = {chr(code): chr(code + 0xFEE0) for code in range(ord("!"), ord("~") + 1)}
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS = {
    letter: near
    for row in _KEYS
    for first, second in pairwise(row)
    for letter, near in ((first, second), (second, first))
}
EMOJI = (
    *"🙂😂🔥👍🎉🙏🤔😭✨🌸🐱🍕📚😅🚀💡🥰😎🤖💀👀🎂🌍🐶🍀🏠🎵",
    *("❤️", "☕️", "⚽️", "🇩🇪", "🇫🇷", "🇪🇸", "🇨🇳", "🇧🇷", "🇺🇦", "🏳️‍🌈", "👩‍💻"),
)
WRAPPERS = (
    ("**", "**"),
    ("_", "_"),
    ("# ", ""),
    ('"', '"'),
    ("\u201c", "\u201d"),
    ("\u00ab ", " \u00bb"),
    ("`", "`"),
    ("```\n", "\n```"),
    ("```text\n", "\n```"),
    ("~~~~\n", "\n~~~~"),
    ("---\n", "\n---"),
    ("[", "]"),
    ("((( ", " )))"),
)
FIELDS = ("message", "text", "prompt", "query", "content", "input", "user_message", "question", "body")
_BESIDE: tuple[dict[str, object], ...] = ({}, {"id": 17}, {"lang": "en"}, {"role": "user"}, {"stream": False, "n": 1})
_MARKS = ("- ", "* ", "\u2022 ", "-> ", "{}. ", "{}) ")

_WORD = re.compile(r"[^\W\d_]{4,}")
_PIECES = re.compile(r"(?<=[.!?;:,])\s+|\n+")


def _substituted(text: str, table: Mapping[str, str], rate: float, rng: random.Random) -> str:
    """Replace each letter in `table` by one of its alternatives with probability `rate`."""
    return "".join(rng.choice(table[one]) if one in table and rng.random() < rate else one for one in text)


def _bare(text: str, _: random.Random) -> str:
    """Remove punctuation, and angle brackets, so that no media mark arises from what remains."""
    return "".join(one for one in text if one not in "<>" and not unicodedata.category(one).startswith("P"))


def _break_lines(text: str, rng: random.Random) -> str:
    """Break lines between words and add empty lines around the text."""
    gap, rate = rng.choice(("\n", "\n\n", "\n\n\n", "  ", " \n ")), rng.uniform(0.1, 1.0)
    broken = re.sub(" ", lambda _: gap if rng.random() < rate else " ", text)
    return rng.choice(("", "\n", "\n\n\n\n")) + broken + rng.choice(("\n", "\n\n\n", "   \n"))


def _leet(text: str, rng: random.Random) -> str:
    letters = rng.sample(sorted(LEET), rng.randint(6, len(LEET)))
    return _substituted(text, {letter: LEET[letter] for letter in letters}, rng.choice((0.5, 0.8, 1.0)), rng)


def _typos(text: str, rng: random.Random) -> str:
    rate = rng.uniform(0.1, 0.5)
    return _WORD.sub(lambda word: _mistyped(word[0], rng) if rng.random() < rate else word[0], text)


def _mistyped(word: str, rng: random.Random) -> str:
    """Swap two letters, or drop, double or mistype one by a neighbouring key; the first and the last letter stay."""
    at = rng.randrange(1, len(word) - 2)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    fault = rng.randrange(4)
    if fault == 0:
        return before + after[0] + letter + after[1:]
    return before + ("", letter * 2, NEIGHBOURS.get(letter, letter))[fault - 1] + after


def _invisible(text: str, rng: random.Random) -> str:
    letters = rng.choice((INVISIBLE, rng.choice(INVISIBLE)))
    rate = rng.uniform(0.1, 0.7)
    return "".join(one + rng.choice(letters) if one.isalnum() and rng.random() < rate else one for one in text)


def _lookalikes(text: str, rng: random.Random) -> str:
    return _substituted(text, LOOKALIKES, rng.uniform(0.1, 0.7), rng)


def _spell_out(text: str, rng: random.Random) -> str:
    """Spell out a few words, or all of them."""
    words = [match.start() for match in _WORD.finditer(text)]
    count = len(words) if rng.random() < 0.2 else rng.randint(1, 4)
    chosen = set(rng.sample(words, min(len(words), count)))
    gap = rng.choice((" ", " ", ".", "-", "_", "*"))
    return _WORD.sub(lambda word: gap.join(word[0]) if word.start() in chosen else word[0], text)


def _full_width(text: str, rng: random.Random) -> str:
    """Make letters of some words, or of all, full width."""
    rate = rng.choice((0.3, 0.6, 1.0))
    return re.sub(r"\S+", lambda word: _substituted(word[0], FULL_WIDTH, float(rng.random() < rate), rng), text)


def _emoji(text: str, rng: random.Random) -> str:
    chosen, rate = rng.sample(EMOJI, rng.randint(1, 4)), rng.choice((0.0, 0.1, 0.3))
    within = re.sub(" ", lambda _: f" {rng.choice(chosen)} " if rng.random() < rate else " ", text)
    before, after = (" ".join(rng.choice(chosen) for _ in range(rng.randint(0, 3))) for _ in range(2))
    return f"{before} {within} {after or rng.choice(chosen)}".strip(" ")


def _wrapped(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return "\n".join(f"> {line}" for line in text.split("\n"))
    before, after = rng.choice(WRAPPERS)
    return before + text + after


def _bullets(text: str, rng: random.Random) -> str:
    mark = rng.choice(_MARKS)
    pieces = [piece for piece in _PIECES.split(text) if piece.strip()]
    return "\n".join(mark.replace("{}", str(number)) + piece for number, piece in enumerate(pieces, 1))


def _as_json_string(text: str, rng: random.Random) -> str:
    fields = [*rng.choice(_BESIDE).items(), (rng.choice(FIELDS), text)]
    rng.shuffle(fields)
    return json.dumps(dict(fields), ensure_ascii=False, indent=rng.choice((None, None, 2)))


@dataclass(frozen=True)
class Kind:
    """A change and its relative weight; `costly` ones take several tokens a letter."""

    change: Change
    weight: float = 1.0
    costly: bool = False


KINDS: dict[str, Kind] = {
    "capitals": Kind(lambda text, _: text.upper(), 2),
    "lower case": Kind(lambda text, _: text.lower()),
    "no punctuation": Kind(_bare),
    "lines": Kind(_break_lines),
    "leetspeak": Kind(_leet, 1.5),
    "typing errors": Kind(_typos, 1.5),
    "invisible letters": Kind(_invisible, 2, costly=True),
    "lookalikes": Kind(_lookalikes, 2, costly=True),
    "spelt out": Kind(_spell_out, costly=True),
    "full width": Kind(_full_width, costly=True),
    "emoji": Kind(_emoji),
    "wrapped": Kind(_wrapped),
    "bullets": Kind(_bullets, 0.5),
    "json": Kind(_as_json_string, 0.5),
}


def varied(rows: Sequence[Sample], section: VariedSection, seed: int) -> list[Sample]:
    """The rows in order, with the chosen ones replaced by variations with longer ids; deterministic for a seed.

    Each repeat of a row is varied separately. Rows with images are unchanged, and so are rows with reasoning, which may
    quote the text.
    """
    result: list[Sample] = []
    earlier: Counter[str] = Counter()
    for row in rows:
        if row.modality != "text" or row.reasoning:
            result.append(row)
            continue
        count, first = times(row), earlier[row.id]
        earlier[row.id] += count
        changed = [new for at in range(first, first + count) if (new := _varied_or_none(row, at, section, seed))]
        if len(changed) < count:
            result.append(with_count(row, count - len(changed)) if changed else row)
        result += changed
    return result


def _varied_or_none(row: Sample, occurrence: int, section: VariedSection, seed: int) -> Sample | None:
    """The varied row, to be used once; None if it is not chosen or no change applies."""
    rng = random.Random(f"{seed}-{section.seed}-varied-{occurrence}-{row.id}")
    if rng.random() >= section.share:
        return None
    response = row.response or ""
    with_answer = not row.prompt.strip() or rng.random() < section.answers
    for name in _weighted_order(rng, max(len(row.prompt), len(response) if with_answer else 0) <= BRIEF):
        texts = {"prompt": changed_text(name, row.prompt, rng)}
        texts["response"] = changed_text(name, response, rng) if with_answer else None
        update = {field: text for field, text in texts.items() if text is not None}
        if update:
            break
    else:
        return None
    plain: dict[Target, str] = {"request": row.prompt, "response": response}
    before = {target: plain[target] for target, field in _TARGETS.items() if field in update}
    once = with_count(row, 1)
    suffix = f"+{name.replace(' ', '-')}" + (f"-{occurrence}" if occurrence else "")
    known = Provenance(variation=name, plain={**before, **once.provenance.plain})
    return once.model_copy(update={**update, "id": never_held_out(row.id + suffix)}).with_provenance(known)


_TARGETS: dict[Target, str] = {"request": "prompt", "response": "response"}


def _weighted_order(rng: random.Random, brief: bool) -> list[str]:
    """The kinds in weighted random order (Efraimidis and Spirakis 2006)."""
    drawn = {name: rng.random() ** (1 / kind.weight) for name, kind in KINDS.items() if brief or not kind.costly}
    return sorted(drawn, key=drawn.__getitem__, reverse=True)


def changed_text(name: str, text: str, rng: random.Random) -> str | None:
    """Apply the change `name`; None if it changes nothing, or if the result is blank or begins with a media mark."""
    if not text.strip():
        return None
    changed = KINDS[name].change(text, rng)
    return None if changed == text or not changed.strip() or marks_fault(changed, 0) else changed
