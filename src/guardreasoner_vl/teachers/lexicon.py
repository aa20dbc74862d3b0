"""Words that point to a kind of harm: where the rules teacher looks for evidence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

CATEGORIES: dict[str, str] = {
    "self-harm": "suicid self-harm selfharm overdos anorexi",
    "terrorism": "terror extremis radicali jihad isis",
    "weapons": "bomb explosiv weapon gun firearm ammunition grenade rifle missile pistol",
    "drugs": "drug cocaine heroin meth methamphetamine marijuana opioid mdma lsd narcotic",
    "cybercrime": "hack malware ransomware virus exploit keylogger ddos phish backdoor trojan botnet spyware",
    "fraud": "fraud scam counterfeit forg launder embezzl brib blackmail extort plagiari impersonat",
    "theft": "steal stole theft thief shoplift burglar robb robbery stolen smuggl traffick loot",
    "sexual content": "sex porn nude erotic naked rape prostitut",
    "violence": "kill murder attack stab shoot assault tortur violen poison kidnap strangl genocid hurt harm "
    "threat destroy punch behead massacre abus abusiv arson stabb",
    "privacy": "stalk spy surveil dox doxx wiretap personal-information",
    "misinformation": "misinformation disinformation conspirac hoax propaganda fake",
    "hate": "hate hateful racis racial nazi inferior immigrant refugee jew jewish muslim islam black white "
    "gay lesbian trans transgender women woman ethnic christian disabled",
    "harassment": "stupid idiot ugly loser bully harass humiliat insult dumb moron pathetic disgust trash shut",
    "illegal acts": "illegal crime criminal unlawful evade bypass sabotag vandal",
    "jailbreak": "jailbreak unfiltered unrestricted uncensored dan restrictions ignore pretend",
}
"""Stems by category, most telling category first.

A stem matches the beginning of a word; one of up to four letters only with an English ending, or `drug` would
find `drugstore` and `dan` any Danish word; `WHOLE` ones match alone.
"""

WHOLE = frozenset(("trans", "dan", "lsd", "isis"))
_SHORT = 4
_ENDINGS = "e|d|s|r|es|ed|er|rs|ers|ing|ings"
_RANK = {stem: (rank, category) for rank, (category, stems) in enumerate(CATEGORIES.items()) for stem in stems.split()}


def _any_of(stems: Iterable[str]) -> str:
    return "|".join(re.escape(stem) for stem in sorted(stems, key=lambda stem: (-len(stem), stem)))


_HIT = re.compile(
    rf"\b(?:(?P<whole>{_any_of(WHOLE)})\b"
    rf"|(?P<short>{_any_of(stem for stem in _RANK if len(stem) <= _SHORT and stem not in WHOLE)})(?:{_ENDINGS})?\b"
    rf"|(?P<long>{_any_of(stem for stem in _RANK if len(stem) > _SHORT and stem not in WHOLE)}))",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class Evidence:
    """The most telling word of a text: its category and its character offset."""

    category: str
    start: int


def find_evidence(text: str) -> Evidence | None:
    """The first word of the most telling category found in `text`, if any."""
    hits = ((_RANK[match[str(match.lastgroup)].lower()], match.start()) for match in _HIT.finditer(text))
    best = min(hits, key=lambda hit: (hit[0][0], hit[1]), default=None)
    return Evidence(best[0][1], best[1]) if best else None
