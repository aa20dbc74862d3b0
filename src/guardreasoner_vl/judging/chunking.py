"""Too long exchanges: overlapping pieces of prompt and response that fit, and the worst of their verdicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

from guardreasoner_vl.errors import InputTooLongError
from guardreasoner_vl.judging.effects import Call, Counted, Reply, counted, question
from guardreasoner_vl.types import Exchange, Judgement, Label, Usage, Verdict

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from guardreasoner_vl.judging.policy import Policy

ANSWER_SHARE = 4
"""A window leaves this part of the model's context, or `max_new_tokens` if that is less, for the answer."""
_MIN_WINDOW = 64
_BRIEF = 20_000
"""Characters whose tokens are counted without looking at the model's context first."""

_TOKEN_CHARACTERS = 16
"""Tokens of natural text are shorter: a text that would fit only with longer ones is not counted as a whole."""

_SHRINK, _AIM = 0.9, 0.97


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst verdict, with the worst judgement of each side.

    An error in one window is an error of the whole, and of each side that is not harmful; what is harmful stays so.
    """
    worst = max(verdicts, key=_badness)
    usage = sum((verdict.usage for verdict in verdicts), Usage())
    failed = next((verdict for verdict in verdicts if verdict.error), None)
    if failed and not worst.flagged:
        return failed.model_copy(update={"usage": usage})
    merged = {
        name: max((getattr(verdict, name) for verdict in verdicts if not verdict.error), key=_judged_badness)
        for name in ("request", "response")
    }
    unjudged = {name: side for name, side in merged.items() if failed and side.label is Label.UNHARMFUL}
    error = failed.error if failed and unjudged else None
    merged |= dict.fromkeys(unjudged, Judgement(label=Label.ERROR))
    return worst.model_copy(update={**merged, "error": error, "usage": usage})


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return bool(verdict.flagged), max(verdict.request.score or 0.0, verdict.response.score or 0.0)


def _judged_badness(judgement: Judgement) -> tuple[int, float]:
    order = (Label.NOT_APPLICABLE, Label.UNHARMFUL, Label.HARMFUL)
    return order.index(judgement.label), judgement.score or 0.0


Pieces: TypeAlias = "tuple[list[str | None], list[str | None]]"
"""Pieces of the prompt and pieces of the response; each pair is a window."""


def windows(exchange: Exchange, policy: Policy) -> Generator[Call, Reply, Pieces]:
    """Prompt and response themselves if they fit, else pieces that do. Raises `InputTooLongError`.

    Never counts more than some windows' tokens at a time, however long the text is.
    """
    whole: Pieces = [exchange.prompt], [exchange.response]
    lengths = len(exchange.prompt or ""), len(exchange.response or "")
    if sum(lengths) <= _BRIEF and _fits((yield from counted(question(exchange, policy))), policy):
        return whole
    bare = replace(exchange, prompt=exchange.prompt and "x", response=exchange.response and "x")
    least = yield from counted(question(bare, policy))
    if least.tokens is None or least.limit is None:
        return whole
    if not _fits(least, policy):
        raise InputTooLongError(
            f"history and images alone take {least.tokens} of the {least.limit} tokens that the model reads: leave "
            "some out"
        )
    most = _TOKEN_CHARACTERS * least.limit
    if _BRIEF < sum(lengths) <= most and _fits((yield from counted(question(exchange, policy))), policy):
        return whole
    pieces = yield from _fitting(exchange, policy, min(max(lengths) * 2 // 3, most), least.tokens, least.limit)
    if pieces is None:
        raise InputTooLongError(
            f"the exchange's {sum(lengths):,} characters need more than {policy.max_windows} windows of the model's "
            f"{least.limit} tokens: raise max_windows (limits.windows of the service), or leave out text, history or "
            "images"
        )
    return pieces


def _fitting(
    exchange: Exchange, policy: Policy, size: int, least: int, limit: int
) -> Generator[Call, Reply, Pieces | None]:
    """Pieces of at most `size` characters, fewer where their tokens do not fit; None if that takes too many windows.

    `least` are the tokens without the text.
    """
    while size >= _MIN_WINDOW:
        prompts = _pieces(exchange.prompt, size, policy.window_overlap)
        responses = _pieces(exchange.response, size, policy.window_overlap)
        if len(prompts) * len(responses) > policy.max_windows:
            return None
        excess = yield from _first_too_long(exchange, policy, (prompts, responses))
        if excess is None:
            return prompts, responses
        size = int(size * min(_SHRINK, _AIM * (_room(policy, limit) - least) / max(1, excess - least)))
    return None


def _first_too_long(exchange: Exchange, policy: Policy, pieces: Pieces) -> Generator[Call, Reply, int | None]:
    """The tokens of the first window that does not fit, None if all do."""
    for prompt, response in product(*pieces):
        found = yield from counted(question(replace(exchange, prompt=prompt, response=response), policy))
        if not _fits(found, policy):
            return found.tokens
    return None


def _fits(found: Counted, policy: Policy) -> bool:
    """Whether prompt and answer fit; where the engine cannot count, it is left to refuse."""
    if found.tokens is None or found.limit is None:
        return True
    return found.tokens <= _room(policy, found.limit)


def _room(policy: Policy, limit: int) -> int:
    """Tokens that a prompt may take."""
    return limit - min(policy.max_new_tokens, limit // ANSWER_SHARE)


def _pieces(text: str | None, size: int, overlap: float) -> list[str | None]:
    """Overlapping pieces of at most `size` characters; blank ones say nothing and are left out."""
    if text is None or len(text) <= size:
        return [text]
    stride = max(1, int(size * (1 - overlap)))
    pieces = (text[start : start + size] for start in range(0, len(text) - size + stride, stride))
    return [piece for piece in pieces if piece.strip()] or [None]
