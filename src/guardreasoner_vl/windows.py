"""Too long exchanges: overlapping pieces of prompt and response that fit, and the worst of their verdicts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from guardreasoner_vl.errors import InputTooLongError
from guardreasoner_vl.policy import Call, Counted, Policy, Reply, counted, question
from guardreasoner_vl.types import Exchange, Judgement, Label, Usage, Verdict

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

ANSWER_SHARE = 4
"""A window leaves this part of the model's context, or `max_new_tokens` if that is less, for the answer."""
MAX_WINDOWS = 1024
_MIN_WINDOW = 64


def worst_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst verdict, with the worst judgement of each side; an error counts unless something is harmful."""
    worst = max(verdicts, key=_badness)
    usage = sum((verdict.usage for verdict in verdicts), Usage())
    failed = next((verdict for verdict in verdicts if verdict.error), None)
    if failed and not worst.flagged:
        return failed.model_copy(update={"usage": usage})
    merged = {
        name: max((getattr(verdict, name) for verdict in verdicts if not verdict.error), key=_judged_badness)
        for name in ("request", "response")
    }
    return worst.model_copy(update={**merged, "usage": usage})


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return bool(verdict.flagged), max(verdict.request.score or 0.0, verdict.response.score or 0.0)


def _judged_badness(judgement: Judgement) -> tuple[int, float]:
    order = (Label.NOT_APPLICABLE, Label.UNHARMFUL, Label.HARMFUL)
    return order.index(judgement.label), judgement.score or 0.0


def windows(exchange: Exchange, policy: Policy) -> Generator[Call, Reply, list[Exchange]]:
    """The exchange itself if it fits, else pieces of its prompt and response that do. Raises `InputTooLongError`."""
    whole = yield from counted(question(exchange, policy))
    if _fits(whole, policy):
        return [exchange]
    size = max(len(exchange.prompt or ""), len(exchange.response or ""))
    while size >= _MIN_WINDOW:
        size = size * 2 // 3
        prompts = _pieces(exchange.prompt, size, policy.window_overlap)
        responses = _pieces(exchange.response, size, policy.window_overlap)
        if len(prompts) * len(responses) > MAX_WINDOWS:
            break
        pieces = [replace(exchange, prompt=prompt, response=response) for prompt in prompts for response in responses]
        if (yield from _all_fit(pieces, policy)):
            return pieces
    raise InputTooLongError(
        f"the exchange takes {whole.tokens} tokens, the model reads {whole.limit}, and no {MAX_WINDOWS} windows of its "
        "prompt and response fit in: leave out text, history or pictures"
    )


def _all_fit(pieces: Sequence[Exchange], policy: Policy) -> Generator[Call, Reply, bool]:
    for piece in pieces:
        tokens = yield from counted(question(piece, policy))
        if not _fits(tokens, policy):
            return False
    return True


def _fits(found: Counted, policy: Policy) -> bool:
    """Whether prompt and answer fit; where the engine cannot count, it is left to refuse."""
    if found.tokens is None or found.limit is None:
        return True
    return found.tokens + min(policy.max_new_tokens, found.limit // ANSWER_SHARE) <= found.limit


def _pieces(text: str | None, size: int, overlap: float) -> list[str | None]:
    """Overlapping pieces of at most `size` characters; blank ones say nothing and are left out."""
    if text is None or len(text) <= size:
        return [text]
    stride = max(1, int(size * (1 - overlap)))
    pieces = (text[start : start + size] for start in range(0, len(text) - size + stride, stride))
    return [piece for piece in pieces if piece.strip()] or [None]
