"""The offline teacher: reasoning written by rules from the ground truth (docs/method.md, section 2).

    request   The user has a question about weapons: "make a bomb".    what is asked: chosen without the label
              It could kill people: the request is harmful.               who could be hurt, and the label
    response  The assistant declines to help, which hurts nobody: the response is unharmful.

A missing request or response takes one step. A hash of the row's id chooses the wording, so that nothing before a
conclusion reveals its label. A whole reasoning has at most 60 tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guardreasoner_vl.protocol import Span, TargetLabel, neutralise
from guardreasoner_vl.sources.categories import OTHER, TAXONOMY
from guardreasoner_vl.teachers.forms import Form, Reply, form_of, is_foreign, reply_of, speaks_of_people
from guardreasoner_vl.teachers.lexicon import find_evidence, find_topic
from guardreasoner_vl.teachers.quoting import first_words, telling_words
from guardreasoner_vl.teachers.wordings import (
    ABSENT,
    AMBIGUOUS,
    ANSWERED,
    ASKED,
    CONCLUDED,
    COULD_HURT,
    DEMEANS,
    DEMEANS_NOBODY,
    EVERYDAY,
    HURTS,
    HURTS_NOBODY,
    KIND_REASONS,
    KINDS,
    PLAIN,
    SETTINGS,
    SHOWN,
    SUBJECTS,
    WHY_NOT,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.teachers.lexicon import Evidence
    from guardreasoner_vl.types import Sample, Target

SEARCHED_CHARACTERS = 4000
QUOTED_ALONE, QUOTED_BESIDE_A_RESPONSE = 4, 3
IMAGE_WORDS = (8, 5, 3)
"""Most words quoted from an image: alone, with one text, with two texts."""


_NO_KIND = frozenset(("false presuppositions",))
_NEAR = 200
_SENTENCE_ENDS = ".!?\n"


@dataclass(frozen=True)
class Step:
    """One reasoning step. Unless `known`, its `conclusion` follows from a pseudo-label and carries no loss."""

    text: str
    conclusion: str = ""
    known: bool = True


@dataclass(frozen=True)
class _Content:
    """The content of a text, independent of its label: evidence of harm, its category, and the topic in words."""

    text: str
    evidence: Evidence | None
    category: str | None
    kind: str | None


def explain(sample: Sample, request: TargetLabel, response: TargetLabel) -> tuple[Span, ...]:
    """The reasoning for `sample`, as the spans inside `<think>`."""
    has_request = request.word != "None"
    has_response = response.word != "None" and bool(sample.response)
    # `category_of` says what a source's category describes; without it, the labelled part, the request first.
    of_request = has_request and (request.known or not has_response)
    category_of = sample.provenance.category_of
    if has_request and has_response and category_of:
        of_request = category_of == "request"
    request_content = _content(sample, _core(sample, "request", _shown_and_asked(sample)), of_request)
    response_content = _content(sample, _core(sample, "response", sample.response or ""), not of_request)
    most = QUOTED_BESIDE_A_RESPONSE if has_response else QUOTED_ALONE
    quote = None if sample.images or not has_request else _quote(request_content, most, sample.prompt)
    first = [_absent("request")]
    if has_request:
        first = [_asked(sample, request_content, quote, has_response), _concluded(sample, request_content, request)]
    second = _absent("response")
    if has_response:
        may_quote = not (has_request and (quote or sample.images))
        response_quote = _quote(response_content, most, sample.response) if may_quote else None
        second = _answered(sample, request_content, response_content, response, response_quote)
    return tuple(_spans((("# Task 1\n", first), ("# Task 2\n", [second]))))


def _spans(tasks: Sequence[tuple[str, Sequence[Step]]]) -> list[Span]:
    spans: list[Span] = []
    number = 0
    for heading, steps in tasks:
        for position, step in enumerate(steps):
            number += 1
            title = ("\n" if spans else "") + (heading if position == 0 else "")
            text = f"{title}## Reasoning Step {number}\n{step.text}"
            if step.known:
                spans.append(Span(text + step.conclusion, True))
            else:
                spans += [Span(text, True), Span(step.conclusion, False)]
    return spans


def _absent(target: Target) -> Step:
    return Step(ABSENT.format(target))


def _asked(sample: Sample, content: _Content, quote: str | None, has_response: bool) -> Step:
    """The step that says what the user shows and asks."""
    about = f" about {content.kind}" if content.kind else ""
    quoted = f": {quote}" if quote else ""
    if not sample.images:
        return Step(_worded(ASKED, sample, "asked").format(_form(content.text, content)) + f"{quoted}.")
    texts = bool(sample.prompt.strip()) + has_response
    opening = _worded(SHOWN, sample, "shown").format(_seen(sample, IMAGE_WORDS[texts]))
    if not sample.prompt.strip():
        return Step(f"{opening}{',' if about else ''}{about}.")
    return Step(f"{opening} beside {_form(sample.prompt, content)}.")


def _form(text: str, content: _Content) -> str:
    """The form of a text, and its topic."""
    form = form_of(_sentence(text, content.evidence if content.text == text else None))
    if content.kind and not (form is Form.CODE and not content.category):
        return f"{'a remark' if form is Form.TALK else form.value} about {content.kind}"
    if is_foreign(text):
        return f"{'a remark' if form is Form.TALK else form.value} in another language"
    if form is Form.REMARK and speaks_of_people(text):
        return "a remark about people"
    return PLAIN[form]


def _concluded(sample: Sample, content: _Content, label: TargetLabel) -> Step:
    if label.word == "harmful":
        reason = _harm(sample, content.category, "request")
    else:
        reason = _no_harm(sample, content, "request", (sample.provenance.kind or "").replace("_", " "))
    return Step("", _worded(CONCLUDED, sample, "so").format(reason, "request", label.word), label.known)


def _answered(
    sample: Sample, request_content: _Content, content: _Content, label: TargetLabel, quote: str | None
) -> Step:
    """The step on the response: what the assistant answers, and whether it hurts anyone."""
    reply = reply_of(content.text)
    if label.word == "harmful":
        reason = _harm(sample, content.category or request_content.category, "response")
    elif reply is Reply.REFUSAL:
        reason = _worded(HURTS_NOBODY, sample, "why not response")
    else:
        reason = _no_harm(sample, content, "response")
    opening = _worded(ANSWERED, sample, "answered").format(_reply_text(reply, content, quote))
    return Step(f"{opening},", f" which {reason}: the response is {label.word}.", label.known)


def _reply_text(reply: Reply, content: _Content, quote: str | None) -> str:
    if reply is Reply.REFUSAL:
        return str(reply.value)
    if quote:
        return f"says {quote}"
    if content.kind and reply is not Reply.CODE:
        return f"{reply.value if reply is Reply.STEPS else 'talks'} about {content.kind}"
    return "answers in another language" if is_foreign(content.text) else str(reply.value)


def _harm(sample: Sample, category: str | None, target: Target) -> str:
    """The reason for harm: who could be hurt."""
    if sample.provenance.task == "toxicity":
        return _worded(DEMEANS, sample, f"why {target}")
    return HURTS.get(category or "") or _worded(COULD_HURT, sample, f"why {target}")


def _no_harm(sample: Sample, content: _Content, target: Target, kind: str = "") -> str:
    """The reason for no harm: from the row's kind, else from the words near the alarming one."""
    place = f"why not {target}"
    if sample.provenance.task == "toxicity":
        return _worded(DEMEANS_NOBODY, sample, place)
    for stem, reason in KIND_REASONS.items():
        if stem in kind:
            return reason
    if content.evidence is None:
        return _worded(HURTS_NOBODY, sample, place)
    near = _near(content.text, content.evidence)
    usual = f"is about {content.kind}" if content.kind in SETTINGS else _worded(EVERYDAY, sample, place)
    return next((reason for reason, words in WHY_NOT.items() if words.search(near)), usual)


def _content(sample: Sample, text: str, is_named: bool) -> _Content:
    """The content of a text: from the source's category if it describes this text, else from the text's words."""
    searched = text[:SEARCHED_CHARACTERS]
    evidence = find_evidence(searched)
    category, subject = _named_category(sample) if is_named else (None, None)
    if not (category or subject):
        category = evidence.category if evidence else None
        subject = _topic(searched, evidence)
    return _Content(text, evidence, category, subject or (KINDS.get(category, category) if category else None))


def _topic(text: str, evidence: Evidence | None) -> str | None:
    """The everyday topic; with an alarming word, only a topic in which that word may have another meaning."""
    if evidence is None:
        return None if is_foreign(text) else find_topic(text)
    topic = find_topic(_near(text, evidence)) if evidence.category in AMBIGUOUS else None
    return topic if topic in SETTINGS else None


def _near(text: str, evidence: Evidence) -> str:
    return text[max(0, evidence.start - _NEAR) : evidence.start + _NEAR]


def _named_category(sample: Sample) -> tuple[str | None, str | None]:
    """The source's category, as a kind of harm or as a subject; both None if it is neither."""
    known = sample.provenance
    name = (known.category or "").casefold()
    if name in SUBJECTS or name in _NO_KIND:
        return None, SUBJECTS.get(name)
    if known.taxonomy in TAXONOMY and known.taxonomy != OTHER:
        return known.taxonomy, None
    evidence = find_evidence(name)
    return (evidence.category if evidence else None), None


def _quote(content: _Content, most: int, text: str | None) -> str | None:
    """The telling words, quoted, if `text` contains them verbatim."""
    words = telling_words(content.text[:SEARCHED_CHARACTERS], content.evidence, most) if content.evidence else None
    return f'"{words}"' if words and text and words in text else None


def _sentence(text: str, evidence: Evidence | None) -> str:
    """The sentence that contains the evidence; the whole text without evidence."""
    if evidence is None:
        return text
    start = max(text.rfind(mark, 0, evidence.start) for mark in _SENTENCE_ENDS) + 1
    ends = [end for mark in _SENTENCE_ENDS if (end := text.find(mark, evidence.start)) >= 0]
    return text[start : min(ends, default=len(text)) + 1]


def _worded(options: Sequence[str], sample: Sample, place: str) -> str:
    """Choose a wording by the row's id and the place in its reasoning, independent of the labels."""
    digest = hashlib.sha256(f"{place}\n{sample.id}".encode("utf-8", "replace")).digest()
    return options[int.from_bytes(digest[:4], "big") % len(options)]


def _core(sample: Sample, target: Target, text: str) -> str:
    """The text that decides the label: in joined rows the original text, in varied rows if `text` shows no evidence."""
    known = sample.provenance
    tells_enough = known.joined is None and find_evidence(text) is not None
    return text if tells_enough else known.plain.get(target, text)


def _shown_and_asked(sample: Sample) -> str:
    return f"{_image_text(sample)} {sample.prompt}" if sample.images else sample.prompt


def _image_text(sample: Sample) -> str:
    return sample.provenance.image_text or ""


def _seen(sample: Sample, most: int) -> str:
    read = neutralise(first_words(_image_text(sample), most))
    described = neutralise(first_words(sample.provenance.image_kind or "", most))
    return f'"{read}"' if read else described or "no readable words"
