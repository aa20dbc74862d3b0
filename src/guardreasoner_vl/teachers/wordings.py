"""The wordings of the rules teacher: openings, conclusions, and reasons for harm and for no harm.

Wordings are plain and short, since a reasoning has 60 tokens; variety costs a small model capacity, so there is little.
"""

from __future__ import annotations

import re

from guardreasoner_vl.teachers.forms import Form

ASKED = ("The user has {}", "The user sends {}", "This message is {}")
SHOWN = ("The picture shows {}", "The image shows {}")
ANSWERED = ("The assistant {}", "The reply {}")
CONCLUDED = ("It {}: the {} is {}.", "This {}: the {} is {}.")
ABSENT = "There is no {} to judge."

PLAIN = {
    Form.CODE: "a coding task",
    Form.PLAY: "a story or role play",
    Form.WRITING: "a request to write something",
    Form.QUESTION: "a general question",
    Form.TALK: "some small talk",
    Form.REQUEST: "a general request",
    Form.REMARK: "a short remark",
}
"""Wordings of a form without a known topic."""

KINDS = {
    "sexual content": "sex",
    "illegal acts": "crime",
    "jailbreak": "AI rules",
    "regulated advice": "expert advice",
    "unethical behaviour": "ethics",
}
"""Categories with a wording other than their name."""

SUBJECTS = {"politics": "politics", "religion": "religion", "economics": "money", "health": "health", "law": "law"}
"""Categories of sources that are a subject, not a kind of harm."""

AMBIGUOUS = frozenset(("violence", "theft"))
SETTINGS = frozenset(
    [
        "computers",
        "mathematics",
        "science",
        "food",
        "health",
        "sport",
        "films",
        "books",
        "music",
        "history",
        "language",
        "cars",
        "weather",
    ]
)
"""`AMBIGUOUS` categories have words with another meaning in the topics of `SETTINGS` (to kill a process)."""

HURTS = {
    "child safety": "could harm children",
    "self-harm": "could cost lives",
    "hate": "demeans people",
    "sexual content": "could degrade someone",
    "weapons": "could kill people",
    "drugs": "could damage health",
    "terrorism": "could kill people",
    "cybercrime": "could damage computers",
    "privacy": "could expose someone",
    "misinformation": "could mislead people",
    "fraud": "could cheat someone",
    "theft": "could rob someone",
    "violence": "could injure someone",
    "harassment": "could humiliate someone",
    "illegal acts": "could help crime",
    "crime": "could help crime",
    "regulated advice": "could mislead someone",
    "copyright": "could rob authors",
}
"""Reasons for harm by category."""

DEMEANS = ("demeans people", "insults people")
COULD_HURT = ("could hurt someone", "could harm people")
HURTS_NOBODY = ("hurts nobody", "harms nobody")
DEMEANS_NOBODY = ("demeans nobody", "insults nobody")
EVERYDAY = ("means no harm", "intends no harm")

_NEAR_WORDS = {
    "is about history": r"histor|centur|ancient|world war|civil war|empire|in 1\d\d\d\b|medieval",
    "explains a term": r"defin|mean(?:s|ing)?\b|what is an?\b|synonym|difference between|etymolog",
    "is only fiction": r"novel|stor(?:y|ies)\b|fiction|movie|film\b|character|video ?game|game\b|poem|episode",
    "is about protection": r"prevent|avoid|protect|safe|detect|defen[ds]|report|recover|victim|cope|quit|stop",
    "concerns only things": r"process|program|python|linux|server|thread|task|file|weeds?\b|bugs?\b|mosquito|bacteria"
    r"|engine|battery|lights?\b|time\b|data",
}
WHY_NOT = {reason: re.compile(rf"\b(?:{words})", re.IGNORECASE) for reason, words in _NEAR_WORDS.items()}
"""Reasons for no harm despite alarming words: the first whose words are near the alarming word."""

KIND_REASONS = {
    "homonym": "means something else",
    "figurative": "is an expression",
    "safe target": "targets no person",
    "safe context": "has an everyday setting",
    "definition": "explains a term",
    "nonsense group": "names no real group",
    "real group": "demeans nobody",
    "histor": "is about history",
    "fiction": "is only fiction",
    "public": "asks for public facts",
}
"""Reasons for no harm by a part of a contrast row's `meta.kind`."""
