"""Answers to the requests of `sources.synthetic.contrast`: help, refusals, warnings and harmful words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.categories import taxonomy
from guardreasoner_vl.sources.synthetic.contrast.requests import filled

if TYPE_CHECKING:
    import random

    from guardreasoner_vl.sources.synthetic.contrast.requests import Request
    from guardreasoner_vl.types import GoldLabel

ON_TOPIC = 0.6
"""Share of answers that repeat the requested verb phrase, if there is one."""

FITTING = 0.75
"""Share of answers whose content matches the request's subject."""

ANY = "any"
_ADDRESSED = {"i": "you", "me": "you", "us": "you", "we": "you", "my": "your", "our": "your", "mine": "yours"}
_ADDRESSED |= {"myself": "yourself", "i'm": "you're", "am": "are"}


@dataclass(frozen=True)
class ContrastAnswer:
    """An answer, its label, and its category of harm if the request is harmless."""

    text: str
    label: GoldLabel
    category: str = ""


def answered(rng: random.Random, request: Request) -> ContrastAnswer:
    """An answer to a request: 45% are harmful for harmful requests, 20% for harmless ones."""
    chance, language = rng.random(), request.language
    if request.line.category:
        if chance < 0.3:
            return ContrastAnswer(refused(rng, request), "unharmful")
        if chance < 0.55:
            return ContrastAnswer(joined(request, refused(rng, request), supported(rng, request)), "unharmful")
        if chance < 0.85:
            return ContrastAnswer(complied(rng, request), "harmful")
        turn = joined(request, refused(rng, request), rng.choice(language.turn))
        return ContrastAnswer(joined(request, turn, complied(rng, request)), "harmful")
    if chance < 0.7:
        return ContrastAnswer(helped(rng, request), "unharmful")
    if chance < 0.8:
        return ContrastAnswer(joined(request, refused(rng, request), rng.choice(language.over_refuse)), "unharmful")
    bad = request.line.group.bad_answers
    harms = bad if bad and rng.random() < FITTING else language.worse
    category = rng.choice(sorted(harms))
    harm = filled(rng, rng.choice(harms[category]), language.slots)
    return ContrastAnswer(joined(request, helped(rng, request), harm) if chance > 0.92 else harm, "harmful", category)


def helped(rng: random.Random, request: Request) -> str:
    """A harmless answer to a harmless request."""
    language, group = request.language, request.line.group
    if not group.framed and group.answers:
        return rng.choice(group.answers)
    fitting = group.answers if group.answers and rng.random() < FITTING else (*language.answer, *language.steps)
    return _framed(rng, request, rng.choice(fitting))


def complied(rng: random.Random, request: Request) -> str:
    """An answer that complies with a harmful request, without usable information."""
    language = request.language
    fitting = language.comply.get(_category(request), language.comply[ANY])
    return _framed(rng, request, rng.choice(fitting if rng.random() < FITTING else language.steps))


def refused(rng: random.Random, request: Request) -> str:
    """A refusal; harmless requests may be refused too."""
    language = request.language
    if request.topic and language.refuse_verb and rng.random() < 0.4:
        return rng.choice(language.refuse_verb).replace("{x}", _addressed(request.topic))
    return rng.choice(language.refuse)


def supported(rng: random.Random, request: Request) -> str:
    """An offer of support in place of what a harmful request asks for."""
    support = request.language.support
    return rng.choice(support.get(_category(request), support[ANY]))


def joined(request: Request, *parts: str) -> str:
    """Join sentences in the language's way."""
    return request.language.space.join(part for part in parts if part)


def _framed(rng: random.Random, request: Request, substance: str) -> str:
    """`substance` in a frame that harmful and harmless answers share."""
    language = request.language
    lead = ""
    if request.topic and language.lead_verb and rng.random() < ON_TOPIC:
        lead = rng.choice(language.lead_verb).replace("{x}", _addressed(request.topic))
    elif rng.random() < 0.5:
        lead = rng.choice(language.lead)
    return joined(request, rng.choice(language.open), lead, substance, rng.choice(language.close))


def _addressed(topic: str) -> str:
    """`topic` addressed to the user: "my boss" becomes "your boss"."""
    return re.sub(r"[A-Za-z']+", lambda word: _ADDRESSED.get(word[0].casefold(), word[0]), topic)


def _category(request: Request) -> str:
    return taxonomy(request.line.category, {})
