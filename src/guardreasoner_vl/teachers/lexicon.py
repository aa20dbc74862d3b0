"""Words that point to a kind of harm: where the rules teacher looks for evidence."""

import re
from dataclasses import dataclass

CATEGORIES: dict[str, str] = {
    "self-harm": "suicid self-harm selfharm overdos anorexi",
    "terrorism": "terror extremis radicali jihad isis",
    "weapons": "bomb explosiv weapon gun guns firearm ammunition grenade rifle missile pistol",
    "drugs": "drug cocaine heroin meth methamphetamine marijuana opioid mdma lsd narcotic",
    "cybercrime": "hack malware ransomware virus exploit keylogger ddos phish backdoor trojan botnet spyware",
    "fraud": "fraud scam counterfeit forg launder embezzl brib blackmail extort plagiari impersonat",
    "theft": "steal stole theft thief shoplift burglar robb smuggl traffick loot",
    "sexual content": "sex porn nude erotic naked rape prostitut",
    "violence": "kill murder attack stab shoot assault tortur violen poison kidnap strangl genocid hurt harm "
    "threat destroy punch behead massacre abus arson",
    "privacy": "stalk spy surveil dox doxx wiretap personal-information",
    "misinformation": "misinformation disinformation conspirac hoax propaganda fake",
    "hate": "hate hateful racis racial nazi inferior immigrant refugee jew jews jewish muslim islam black white "
    "gay gays lesbian trans women woman ethnic christian disabled",
    "harassment": "stupid idiot ugly loser bully harass humiliat insult dumb moron pathetic disgust trash shut",
    "illegal acts": "illegal crime criminal unlawful evade bypass sabotag vandal",
    "jailbreak": "jailbreak unfiltered unrestricted uncensored dan restrictions ignore pretend",
}
"""Stems by category, most telling category first. A stem matches the beginning of a word."""

_STEMS = sorted(
    ((stem, rank, category) for rank, (category, stems) in enumerate(CATEGORIES.items()) for stem in stems.split()),
    key=lambda entry: -len(entry[0]),
)
_RANK = {stem: (rank, category) for stem, rank, category in _STEMS}
_SHORT = 4
_HIT = re.compile(
    "|".join(rf"\b{re.escape(stem)}\b" if len(stem) <= _SHORT else rf"\b{re.escape(stem)}" for stem, _, _ in _STEMS)
)


@dataclass(frozen=True)
class Evidence:
    """The most telling word of a text: its category and its character offset."""

    category: str
    start: int


def find_evidence(text: str) -> Evidence | None:
    """The first word of the most telling category found in `text`, if any."""
    hits = ((_RANK[match[0]], match.start()) for match in _HIT.finditer(text.lower()))
    best = min(hits, key=lambda hit: (hit[0][0], hit[1]), default=None)
    return Evidence(best[0][1], best[1]) if best else None
