"""How a guard is asked: system instruction and one user message (protocol, section 1)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Literal

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.protocol.neutralise import neutralise
from guardreasoner_vl.types import Exchange, unix_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guardreasoner_vl.types import ImageSource, Turn

IMAGE = "<image>"
"""Stands for the model's own vision placeholder, once per image, in order."""

NONE = "None"
INSTRUCTION = (files("guardreasoner_vl.protocol") / "instruction.txt").read_text("utf-8")


@dataclass(frozen=True)
class Message:
    """One chat message; `IMAGE` in `text` marks where an image stands."""

    role: Literal["system", "user", "assistant"]
    text: str


def render_turn(turn: Turn) -> str:
    """One `Human user:` / `AI assistant:` pair."""
    prompt = [neutralise(turn.prompt)] if turn.prompt and turn.prompt.strip() else []
    asked = "\n".join([IMAGE] * len(turn.images) + prompt) or NONE
    answered = neutralise(turn.response) if turn.has_response and turn.response else NONE
    return f"Human user:\n{asked}\n\nAI assistant:\n{answered}\n"


def build_messages(exchange: Exchange) -> tuple[Message, Message]:
    """The system and the user message that ask a guard about `exchange`."""
    transcript = "\n".join(render_turn(turn) for turn in (*exchange.history, exchange))
    return Message("system", INSTRUCTION), Message("user", transcript)


def parse_released_input(text: str, images: Sequence[ImageSource] = ()) -> Exchange:
    """Read the `input` of a released test file back into an exchange (method, section 7).

    The instruction may stand before it. Leading `<image>` lines are dropped: the file lists its images
    beside the text, and `images` hands them in. A field that holds the word `None` is absent. Raises
    `InputError` when the text has not the released layout or the exchange is empty.
    """
    _, asked, rest = unix_lines(text).partition("Human user:\n")
    prompt, answered, response = rest.partition("\n\nAI assistant:\n")
    if not (asked and answered):
        raise InputError("not a released input: expected 'Human user:' and 'AI assistant:' fields")
    while prompt == IMAGE or prompt.startswith(f"{IMAGE}\n"):
        prompt = prompt.removeprefix(IMAGE).removeprefix("\n")
    return Exchange(_unless_none(prompt), tuple(images), _unless_none(response.rstrip()))


def _unless_none(text: str) -> str | None:
    return None if text.strip() in ("", NONE) else text
