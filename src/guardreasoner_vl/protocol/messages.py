"""Builds a guard's prompt: the system instruction and one user message (docs/protocol.md, section 1)."""

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
"""Placeholder for the model's vision tokens, once per image, in order."""

NONE = "None"
INSTRUCTION = (files("guardreasoner_vl.protocol") / "instruction.txt").read_text("utf-8")


@dataclass(frozen=True)
class Message:
    """One chat message; each `IMAGE` in `text` marks the position of an image."""

    role: Literal["system", "user", "assistant"]
    text: str


def render_turn(turn: Turn) -> str:
    """Render a turn as one `Human user:` / `AI assistant:` pair."""
    prompt = [neutralise(turn.prompt)] if turn.prompt and turn.prompt.strip() else []
    request = "\n".join([IMAGE] * len(turn.images) + prompt) or NONE
    response = neutralise(turn.response) if turn.has_response and turn.response else NONE
    return f"Human user:\n{request}\n\nAI assistant:\n{response}\n"


def build_messages(exchange: Exchange) -> tuple[Message, Message]:
    """Build the system message and the user message for judging `exchange`."""
    transcript = "\n".join(render_turn(turn) for turn in (*exchange.history, exchange))
    return Message("system", INSTRUCTION), Message("user", transcript)


def parse_released_input(text: str, images: Sequence[ImageSource] = ()) -> Exchange:
    """Convert the `input` of a released test file to an exchange (docs/method.md, section 7).

    The instruction may precede it. Leading `<image>` lines are dropped: the file lists its images separately from the
    text, and the caller passes them as `images`. A field that is the word `None` is absent. Raises `InputError` if the
    text does not have the released layout or the exchange is empty.
    """
    _, request_field, rest = unix_lines(text).partition("Human user:\n")
    prompt, response_field, response = rest.partition("\n\nAI assistant:\n")
    if not (request_field and response_field):
        raise InputError("not a released input: give a text with the fields 'Human user:' and 'AI assistant:'")
    while prompt == IMAGE or prompt.startswith(f"{IMAGE}\n"):
        prompt = prompt.removeprefix(IMAGE).removeprefix("\n")
    return Exchange(_unless_none(prompt), tuple(images), _unless_none(response.rstrip()))


def _unless_none(text: str) -> str | None:
    return None if text.strip() in ("", NONE) else text
