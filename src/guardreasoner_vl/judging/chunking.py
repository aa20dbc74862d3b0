"""Splits long exchanges into overlapping windows that fit into the context, and merges the windows' verdicts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, TypeAlias

from guardreasoner_vl.errors import InputTooLongError
from guardreasoner_vl.judging.effects import EngineCall, EngineReply, TokenCount, build_request, call_count
from guardreasoner_vl.judging.policy import action_on_error
from guardreasoner_vl.types import Exchange, Judgement, Label, Usage, Verdict

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from guardreasoner_vl.judging.policy import Policy

ANSWER_SHARE = 4
"""A window leaves 1 / ANSWER_SHARE of the context for the answer, or `max_new_tokens` tokens if that is less."""
_MIN_WINDOW = 64
_BRIEF = 20_000
"""Exchanges of at most this many characters are counted whole at once, without a check of the model's context."""

_TOKEN_CHARACTERS = 16
"""An upper bound on the characters per token of natural text: a longer text cannot fit and is not counted whole."""

_SHRINK, _AIM = 0.9, 0.97


def merge_worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Merge the windows' verdicts into the worst, with the worst judgement of the request and of the response.

    If a window failed, the merged verdict is an error, and so is each target that is not harmful; a harmful target
    stays harmful. The error is the first that blocks whatever `on_error` says, if there is any.
    """
    worst = max(verdicts, key=_badness)
    usage = sum((verdict.usage for verdict in verdicts), Usage())
    failed = max((verdict for verdict in verdicts if verdict.error), key=_always_blocks, default=None)
    if failed and not worst.flagged:
        return failed.model_copy(update={"usage": usage})
    merged = {
        name: max((getattr(verdict, name) for verdict in verdicts if not verdict.error), key=_judgement_badness)
        for name in ("request", "response")
    }
    unknown = [name for name, judgement in merged.items() if failed and judgement.label is Label.UNHARMFUL]
    error = failed.error if failed and unknown else None
    merged |= dict.fromkeys(unknown, Judgement(label=Label.ERROR))
    return worst.model_copy(update={**merged, "error": error, "usage": usage})


def _always_blocks(verdict: Verdict) -> bool:
    return verdict.error is not None and action_on_error(verdict.error.code, "allow") == "block"


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return bool(verdict.flagged), max(verdict.request.score or 0.0, verdict.response.score or 0.0)


def _judgement_badness(judgement: Judgement) -> tuple[int, float]:
    order = (Label.NOT_APPLICABLE, Label.UNHARMFUL, Label.HARMFUL)
    return order.index(judgement.label), judgement.score or 0.0


Chunks: TypeAlias = "tuple[list[str | None], list[str | None]]"
"""Chunks of the prompt and chunks of the response; each pair is a window."""


def split_to_context(exchange: Exchange, policy: Policy) -> Generator[EngineCall, EngineReply, Chunks]:
    """Split prompt and response into chunks that fit into the context; one chunk each if the whole fits.

    However long the text is, no more than a few windows' tokens are counted at a time. Raises `InputTooLongError`.
    """
    whole: Chunks = [exchange.prompt], [exchange.response]
    lengths = len(exchange.prompt or ""), len(exchange.response or "")
    history = sum(len(text or "") for turn in exchange.history for text in (turn.prompt, turn.response))
    is_brief = history + sum(lengths) <= _BRIEF
    if is_brief and _fits_context((yield from call_count(build_request(exchange, policy))), policy):
        return whole
    if history > _BRIEF:
        short = yield from call_count(build_request(Exchange(prompt="x"), policy))
        if short.limit is not None and history > _TOKEN_CHARACTERS * short.limit:
            raise InputTooLongError(
                f"the history's {history:,} characters cannot fit into the {short.limit} tokens that the model reads: "
                "remove earlier turns"
            )
    bare = replace(exchange, prompt=exchange.prompt and "x", response=exchange.response and "x")
    least = yield from call_count(build_request(bare, policy))
    if least.tokens is None or least.limit is None:
        return whole
    if not _fits_context(least, policy):
        raise InputTooLongError(
            f"history and images alone take {least.tokens} of the {least.limit} tokens that the model reads: remove "
            "some of them"
        )
    max_length = _TOKEN_CHARACTERS * least.limit
    if not is_brief and sum(lengths) <= max_length:
        count = yield from call_count(build_request(exchange, policy))
        if _fits_context(count, policy):
            return whole
    size = min(max(lengths) * 2 // 3, max_length)
    chunks = yield from _fitting_chunks(exchange, policy, size, least.tokens, least.limit)
    if chunks is None:
        raise InputTooLongError(
            f"the exchange's {sum(lengths):,} characters need more than {policy.max_windows} windows of the model's "
            f"{least.limit} tokens: raise max_windows (limits.windows of the service), or remove text, history or "
            "images"
        )
    return chunks


def _fitting_chunks(
    exchange: Exchange, policy: Policy, size: int, least: int, limit: int
) -> Generator[EngineCall, EngineReply, Chunks | None]:
    """Chunks of at most `size` characters, less if their tokens do not fit; None if that needs too many windows.

    `least` is the number of tokens without the text, `limit` the model's context in tokens.
    """
    while size >= _MIN_WINDOW:
        prompts = split_text(exchange.prompt, size, policy.window_overlap)
        responses = split_text(exchange.response, size, policy.window_overlap)
        if len(prompts) * len(responses) > policy.max_windows:
            return None
        excess = yield from _first_too_long(exchange, policy, (prompts, responses))
        if excess is None:
            return prompts, responses
        size = int(size * min(_SHRINK, _AIM * (_room(policy, limit) - least) / max(1, excess - least)))
    return None


def _first_too_long(
    exchange: Exchange, policy: Policy, chunks: Chunks
) -> Generator[EngineCall, EngineReply, int | None]:
    """The number of tokens of the first window that does not fit; None if all fit."""
    for prompt, response in product(*chunks):
        count = yield from call_count(build_request(replace(exchange, prompt=prompt, response=response), policy))
        if not _fits_context(count, policy):
            return count.tokens
    return None


def _fits_context(count: TokenCount, policy: Policy) -> bool:
    """Whether prompt and answer fit; true if the engine cannot count, since it then refuses what does not fit."""
    if count.tokens is None or count.limit is None:
        return True
    return count.tokens <= _room(policy, count.limit)


def _room(policy: Policy, limit: int) -> int:
    """The largest number of tokens of a prompt."""
    return limit - min(policy.max_new_tokens, limit // ANSWER_SHARE)


def split_text(text: str | None, size: int, overlap: float) -> list[str | None]:
    """Overlapping chunks of at most `size` characters, without blank ones."""
    if text is None or len(text) <= size:
        return [text]
    stride = max(1, int(size * (1 - overlap)))
    chunks = (text[start : start + size] for start in range(0, len(text) - size + stride, stride))
    return [chunk for chunk in chunks if chunk.strip()] or [None]
