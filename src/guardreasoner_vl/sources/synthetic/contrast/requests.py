"""Turn a pattern into a request: fill its slots, put a sentence around it, vary its spelling."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from guardreasoner_vl.sources.synthetic.contrast.texts import Language, Line, Words

SLOT = re.compile(r"\{([a-z]+)\}")
TAILS, STEALTH, STORIES, WRAPPED = 0.15, 0.06, 0.1, 0.25
LOWER, BARE, RAISED = 0.22, 0.12, 0.5
"""Shares of requests in lower case, without final punctuation, and with an initial capital."""


@dataclass(frozen=True)
class Request:
    """A request and its origin; `topic` is the verb phrase with all slots filled, empty for a sentence."""

    text: str
    topic: str
    line: Line
    language: Language


def requested(rng: random.Random, line: Line, language: Language) -> Request:
    """Make a request from a line of that language."""
    slots = {**language.slots, **line.group.slots}
    topic = filled(rng, line.text, slots)
    if not line.group.framed:
        return Request(spelt(rng, topic), "", line, language)
    if line.is_sentence:
        text = rng.choice(language.sentence).replace("{x}", topic)
    else:
        text = rng.choice(language.verb).replace("{x}", topic + _tail(rng, line, language))
        if rng.random() < WRAPPED:
            text = rng.choice(language.sentence).replace("{x}", raised(text))
    if rng.random() < STORIES:
        text = language.space.join((*_story(rng, language), raised(text)))
    for letters, shorter in language.contractions.items():
        text = text.replace(letters, shorter)
    return Request(spelt(rng, text), "" if line.is_sentence else topic, line, language)


def _story(rng: random.Random, language: Language) -> list[str]:
    """Up to four sentences on another subject."""
    sentences = rng.sample(language.before, rng.randint(1, min(4, len(language.before))))
    return [raised(filled(rng, sentence, language.slots)) for sentence in sentences]


def _tail(rng: random.Random, line: Line, language: Language) -> str:
    chance = rng.random()
    if chance < STEALTH and line.group.stealth and language.stealth:
        return f" {rng.choice(language.stealth)}"
    if chance > 1 - TAILS and language.tail:
        return f" {rng.choice(language.tail)}"
    return ""


def filled(rng: random.Random, text: str, slots: Mapping[str, Words]) -> str:
    """`text` with every slot replaced by a word, also slots inside these words."""
    while match := SLOT.search(text):
        text = text[: match.start()] + rng.choice(slots[match[1]]) + text[match.end() :]
    return text


def spelt(rng: random.Random, text: str) -> str:
    """`text` with random case and final punctuation, as different people type."""
    chance = rng.random()
    if chance < LOWER:
        text = text.lower()
    elif chance < LOWER + RAISED:
        text = raised(text)
    return text.rstrip(" .?!。？！।؟;") or text if rng.random() < BARE else text


def raised(text: str) -> str:
    """`text` with an initial capital."""
    return text[:1].upper() + text[1:]
