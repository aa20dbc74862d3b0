"""The rules teacher's word lists: words that point to a kind of harm, and words that point to an everyday topic."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

CATEGORIES: dict[str, str] = {
    "self-harm": "suicid self-harm selfharm overdos anorexi kill-myself kill-yourself hurt-myself cut-myself "
    "end-my-life",
    "terrorism": "terror extremis radicali jihad isis",
    "weapons": "bomb explosiv weapon gun firearm ammunition grenade rifle missile pistol",
    "drugs": "drug cocaine heroin meth methamphetamine marijuana opioid mdma lsd narcotic",
    "cybercrime": "hack malware ransomware computer-virus exploit keylogger ddos phish backdoor trojan botnet spyware",
    "fraud": "fraud scam counterfeit forg launder embezzl brib blackmail extort plagiari impersonat",
    "theft": "steal stole stolen theft thief thieves shoplift burglar robb robbery smuggl traffick loot",
    "sexual content": "sex sexual porn pornograph nude erotic naked rape rapist prostitut",
    "violence": "kill murder attack stab stabb shoot assault assassinat tortur violen poison kidnap strangl genocid "
    "hurt harm threat destroy punch behead massacre abus abusiv arson",
    "privacy": "stalk spy surveil dox doxx wiretap personal-information home-address social-security",
    "misinformation": "misinformation disinformation conspirac hoax propaganda fake",
    "hate": "hate hateful racis racial racist nazi inferior subhuman slur",
    "harassment": "stupid idiot ugly loser bully bullie harass humiliat insult dumb moron pathetic disgust shut-up",
    "illegal acts": "illegal crime criminal unlawful evade bypass sabotag vandal",
    "jailbreak": "jailbreak unfiltered unrestricted uncensored no-restrictions without-restrictions do-anything-now "
    "ignore-all ignore-previous",
}
"""Stems by category, most telling category first; a hyphen matches a hyphen or a space.

A stem matches the beginning of a word. Stems of up to four letters and `INFLECTED` ones must be followed by an English
ending or nothing, or `drug` would match `drugstore` and `steal` would match `stealth`. `WHOLE` stems match alone.
"""

TOPICS: dict[str, str] = {
    "health": "health* medic* doctor disease symptom patient hospital pain pregnan* diabet* cancer vaccin* sleep diet "
    "vitamin therap* headache virus syndrome diagnos* surgery injection prescri* dose",
    "food": "food cook* recipe bak* bread cake meal dinner lunch restaurant coffee beer drink eat kitchen vegetable "
    "chicken soup sauce",
    "money": "money bank price salary budget invest* loan tax taxes payment buy sell dollar insurance credit",
    "computers": "computer software program* code python java file server website internet email phone database linux "
    "windows password app algorithm",
    "mathematics": "math* equation calculat* triangle probabilit* algebra percent* geometr*",
    "science": "physic* chemi* biolog* planet energy atom species experiment scien* quantum molecul*",
    "history": "histor* century centuries ancient empire emperor medieval revolution* war",
    "law": "law legal* court lawyer police judge contract visa",
    "school": "school student teacher exam homework universit* lesson college classroom",
    "work": "job employ* boss colleague interview resume office business company customer market*",
    "travel": "travel* trip flight hotel airport train ticket tourist*",
    "family": "family families mother father parent child children kid friend husband wife daughter son brother sister "
    "baby wedding",
    "animals": "animal dog cat pet bird fish horse insect",
    "home": "house home garden* clean* furniture room apartment plant paint",
    "sport": "sport game football team player soccer tennis chess match olympic*",
    "music": "music* song guitar band album concert piano",
    "films": "movie film actor tv netflix cinema",
    "books": "book novel author poem poet* story stories library",
    "politics": "government election president politic* vote* voting democra* senator congress parliament",
    "religion": "religio* god church bible islam* prayer pray",
    "language": "language translat* grammar english spelling",
    "feelings": "sad angry happy lonely anxious feel feeling love stress* mood",
    "weather": "weather rain snow temperature storm",
    "cars": "car engine drive driving bike bicycle truck tire",
    "places": "city cities country countries river mountain island europe* asia* africa* american*",
    "people": "people person woman women man men girl guy immigrant* refugee* jew jewish muslim* christian* gay "
    "lesbian transgender ethnic* disabled minority minorities",
}
"""Words by everyday topic. A word matches alone and with a plural s; a word with `*` matches as a prefix."""

WHOLE = frozenset(("lsd", "isis", "heroin"))
INFLECTED = frozenset(("steal", "stole", "crime", "punch", "loser", "bully"))
_SHORT = 4
_ENDINGS = "e|d|s|r|es|ed|er|rs|ers|ing|ings"
_RANK = {stem: (rank, category) for rank, (category, stems) in enumerate(CATEGORIES.items()) for stem in stems.split()}
_ENDED = frozenset(stem for stem in _RANK if len(stem) <= _SHORT or stem in INFLECTED) - WHOLE


def _any_of(stems: Iterable[str]) -> str:
    ordered = sorted(stems, key=lambda stem: (-len(stem), stem))
    return "|".join(re.escape(stem).replace(r"\-", "[- ]") for stem in ordered)


_HIT = re.compile(
    rf"\b(?:(?P<whole>{_any_of(WHOLE)})\b"
    rf"|(?P<long>{_any_of(stem for stem in _RANK if stem not in _ENDED | WHOLE)})"
    rf"|(?P<short>{_any_of(_ENDED)})(?:{_ENDINGS})?\b)",
    re.IGNORECASE | re.ASCII,
)
_TOPIC_OF = {word.rstrip("*"): topic for topic, words in TOPICS.items() for word in words.split()}
_TOPIC = re.compile(
    r"\b(?:(?P<begun>{})|(?P<alone>{})s?\b)".format(
        *(
            _any_of(
                word.rstrip("*") for words in TOPICS.values() for word in words.split() if word.endswith("*") is begun
            )
            for begun in (True, False)
        )
    ),
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True)
class Evidence:
    """The most telling word of a text: its category and its offset in characters."""

    category: str
    start: int


def find_evidence(text: str) -> Evidence | None:
    """The first word of the most telling category in `text`; None if there is none."""
    hits = ((_RANK[_stem(match)], match.start()) for match in _HIT.finditer(text))
    best = min(hits, key=lambda hit: (hit[0][0], hit[1]), default=None)
    return Evidence(best[0][1], best[1]) if best else None


def find_topic(text: str) -> str | None:
    """The everyday topic with most words in `text`, the first in `TOPICS` on a tie; None without any."""
    counts = Counter(_TOPIC_OF[_stem(match)] for match in _TOPIC.finditer(text))
    return max(TOPICS, key=lambda topic: counts[topic]) if counts else None


def _stem(match: re.Match[str]) -> str:
    """The stem that matched, spelt as in the lists (`kill-myself` for the text `kill myself`)."""
    return match[str(match.lastgroup)].lower().replace(" ", "-")
