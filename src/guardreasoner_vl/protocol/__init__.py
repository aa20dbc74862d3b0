"""A guard's prompts and answers: the grammar shared by prompts, training targets, reward and parser."""

from guardreasoner_vl.protocol.answer import ParsedAnswer, Reason, parse_verdict
from guardreasoner_vl.protocol.messages import (
    IMAGE,
    INSTRUCTION,
    Message,
    build_messages,
    parse_released_input,
    render_turn,
)
from guardreasoner_vl.protocol.modes import (
    CANDIDATES,
    END_OF_RESULT,
    END_OF_THINK,
    FAST_PREFIX,
    MAX_TOKENS_AFTER_RESULT,
    RESPONSE_FIELD,
    Span,
    TargetLabel,
    training_target,
)
from guardreasoner_vl.protocol.neutralise import neutralise
from guardreasoner_vl.protocol.quotes import QuoteFilter

__all__ = [
    "CANDIDATES",
    "END_OF_RESULT",
    "END_OF_THINK",
    "FAST_PREFIX",
    "IMAGE",
    "INSTRUCTION",
    "MAX_TOKENS_AFTER_RESULT",
    "RESPONSE_FIELD",
    "Message",
    "ParsedAnswer",
    "QuoteFilter",
    "Reason",
    "Span",
    "TargetLabel",
    "build_messages",
    "neutralise",
    "parse_released_input",
    "parse_verdict",
    "render_turn",
    "training_target",
]
