"""Harmless sentences to pad requests and answers with: from the mixture's unharmful rows, and everyday ones."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING

from guardreasoner_vl.sources.union import class_of

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator

    from guardreasoner_vl.types import Sample

EVERYDAY = tuple((files("guardreasoner_vl.sources.synthetic") / "everyday.txt").read_text("utf-8").splitlines())
"""Sentences made up for this project, in five languages."""

_HARMFUL = 0.05
"""Highest ratio of harmful to unharmful rows at which a source still provides sentences."""

_SHARE_EVERYDAY = 0.25
_SHARE_IN_ORDER = 0.5
_OF_ONE_ANSWER = 8
"""Maximum number of sentences from one answer, so that long answers do not dominate."""

_SHORTEST, _LONGEST = 3, 200
_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
_SENTENCE = re.compile(r"[^\W\d_][^\n<>|{}()\[\]\\`]*(?:[^\W\d_]{3}[.!?]|[。！？])")
_ODD = re.compile(r"[\n<>|{}\\`]")


@dataclass(frozen=True)
class Filler:
    """A harmless text, and the ids of the rows it comes from."""

    text: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Fillers:
    """Harmless (sentence, row id) pairs in their original order; everyday sentences are drawn in addition."""

    sentences: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Iterable[Sample]) -> Fillers:
        """Short requests and sentences of answers from unharmful rows of sources that are almost entirely unharmful.

        In sources with both classes, unharmful rows are often borderline: replies to hate, or near misses.
        """
        rows = [row for row in rows if row.modality == "text"]
        classes = Counter((row.source, class_of(row)) for row in rows)
        calm = {
            name
            for name, label in classes
            if label == "unharmful" and classes[name, "harmful"] <= _HARMFUL * classes[name, "unharmful"]
        }
        harmless = (row for row in rows if row.source in calm and _harmless(row))
        return cls([(sentence, row.id) for row in harmless for sentence in _sentences(row)])

    def drawn(self, count: int, rng: random.Random) -> Filler:
        """Draw `count` sentences, joined by spaces or line breaks: consecutive ones, or independently drawn ones."""
        gap = rng.choice((" ", " ", "\n"))
        if not self.sentences or rng.random() < _SHARE_EVERYDAY:
            return Filler(gap.join(rng.choices(EVERYDAY, k=count)), ())
        if rng.random() < _SHARE_IN_ORDER:
            first = rng.randrange(max(1, len(self.sentences) - count + 1))
            some = self.sentences[first : first + count]
        else:
            some = rng.choices(self.sentences, k=count)
        return Filler(gap.join(sentence for sentence, _ in some), tuple(dict.fromkeys(name for _, name in some)))

    def passages(self, characters: int, rng: random.Random) -> list[Filler]:
        """Draw paragraphs with at least `characters` characters in total."""
        result: list[Filler] = []
        while sum(len(filler.text) for filler in result) < characters:
            result.append(self.drawn(rng.randint(3, 12), rng))
        return result


def _harmless(row: Sample) -> bool:
    if row.request_label != "unharmful" or row.response_label == "harmful":
        return False
    known = row.provenance
    return not known.weak and known.task != "toxicity"


def _sentences(row: Sample) -> Iterator[str]:
    prompt = row.prompt.strip()
    if _SHORTEST <= len(prompt) <= _LONGEST and not _ODD.search(prompt):
        yield prompt
    if row.response_label == "unharmful" and row.response:
        pieces = [piece.strip() for piece in _END.split(row.response, maxsplit=4 * _OF_ONE_ANSWER)]
        whole = [piece for piece in pieces if len(piece) <= _LONGEST and _SENTENCE.fullmatch(piece)]
        yield from whole[:_OF_ONE_ANSWER]
