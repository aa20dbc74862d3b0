"""One taxonomy for the categories of all sources.

Every data set names kinds of harm in its own way; a name is mapped by the word stems in it, the first match wins.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Mapping

OTHER = "other"
_STEMS: dict[str, str] = {
    "child safety": "child minor csam",
    "self-harm": "suicid self-harm self_harm selfharm",
    "hate": "hate identity discriminat stereotyp racis representation religio",
    "sexual content": "sexual porn nud adult explicit",
    "weapons": "weapon gun knife firearm explosive",
    "drugs": "drug substance alcohol cigarette tobacco",
    "terrorism": "terror extremis",
    "cybercrime": "cyber malware hack",
    "privacy": "privacy private pii sensitive personal surveillance",
    "misinformation": "misinform disinform false mislead deception deceptive political politics election conspira",
    "fraud": "fraud scam financial economic spam theft property socioeconomic",
    "violence": "violen physical blood gore shocking threat abuse assault kill murder injur",
    "harassment": "harass bully insult profan toxic defam offensive gesture",
    "regulated advice": "medical health legal advice mental over-reliance",
    "copyright": "copyright intellectual",
    "crime": "criminal crime illegal illicit malicious unlawful",
    "unethical behaviour": "unethical immoral autonomy risky controversial caution",
}
TAXONOMY = (*_STEMS, OTHER)
_PATTERNS = {
    name: re.compile(rf"(?<![a-z])(?:{'|'.join(map(re.escape, stems.split()))})") for name, stems in _STEMS.items()
}


def taxonomy(category: str, overrides: Mapping[str, str]) -> str:
    """Map a source's category to the taxonomy; `overrides` win. Raises `RecipeError` for an unknown target."""
    target = overrides.get(category)
    if target is None:
        return _by_stem(category.casefold())
    if target not in TAXONOMY:
        raise RecipeError(f"data.categories: {target!r:.40} is not in the taxonomy; use {', '.join(TAXONOMY)}")
    return target


@cache
def _by_stem(category: str) -> str:
    return next((name for name, pattern in _PATTERNS.items() if pattern.search(category)), OTHER)
