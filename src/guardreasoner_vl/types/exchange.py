"""The input of a guard: a user's request and the model's response, also read from OpenAI-style messages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator

from guardreasoner_vl.errors import ImageError, InputError
from guardreasoner_vl.types.media import is_data_url, unread_medium

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from guardreasoner_vl.types.image import CheckedImage


ImageSource: TypeAlias = "str | Path | bytes | Image | CheckedImage"
"""An image: a file path, a `data:` URL, encoded bytes, a PIL image, or a `CheckedImage`."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of an assistant's message that hold its reasoning."""

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
"""Types of the parts of a message that hold text."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def unix_lines(text: str) -> str:
    """`text` with `\\r\\n` and `\\r` replaced by `\\n`, so that the style of line ends does not change a verdict."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


UnixLines: TypeAlias = Annotated[str, AfterValidator(unix_lines)]
"""A text whose line ends become `\\n`."""


def _is_present(text: str | None) -> bool:
    return bool(text and text.strip())


@dataclass(frozen=True)
class Turn:
    """One user turn and the answer to it. Whitespace alone counts as absent; line ends become `\\n`.

    Raises `InputError` for fields of a wrong type, and for strings with lone surrogates, which a tokenizer, a file name
    or a `data:` URL cannot contain.
    """

    prompt: str | None = None
    images: tuple[ImageSource, ...] = ()
    response: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "response"):
            object.__setattr__(self, name, _checked_text(getattr(self, name), name))
        object.__setattr__(self, "images", _check_images(self.images))

    @property
    def has_prompt(self) -> bool:
        """Whether there is a request to judge: a text or an image."""
        return _is_present(self.prompt) or bool(self.images)

    @property
    def has_response(self) -> bool:
        """Whether there is a response to judge."""
        return _is_present(self.response)


def _checked_text(text: object, name: str) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string or null, not {type(text).__name__}")
    if _is_broken(text):
        raise InputError("the text is not valid Unicode (a lone surrogate): decode it again")
    return unix_lines(text)


def _check_images(images: object) -> tuple[Any, ...]:
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise InputError("images must be a sequence of images: put the one image into a tuple")
    sources = tuple(images)
    for image in sources:
        if isinstance(image, str) and _is_broken(image):
            raise ImageError("an image's string is not valid Unicode (a lone surrogate): encode the image again")
        # PIL images and `CheckedImage` are recognised by `width`, to avoid importing either.
        if not (isinstance(image, (str, bytes, Path)) or hasattr(image, "width")):
            kind = type(image).__name__
            raise ImageError(f"{kind} is not an image: pass a path, bytes, a data: URL or a PIL image")
    return sources


def _is_broken(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None


@dataclass(frozen=True)
class Exchange(Turn):
    """A user's request and the model's response; `history` is context and is not judged.

    Raises `InputError` if prompt, images and response are all missing, and for what `Turn` rejects.
    """

    history: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "history", tuple(self.history))
        if not all(isinstance(turn, Turn) for turn in self.history):
            raise InputError("history must be a sequence of Turn: prompt, images and response of each earlier turn")
        if not (self.has_prompt or self.has_response):
            raise InputError("the exchange is empty: give a prompt, an image or a response")

    @property
    def all_images(self) -> tuple[ImageSource, ...]:
        """Every image of the conversation, in reading order."""
        return tuple(image for turn in (*self.history, self) for image in turn.images)

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]]) -> Exchange:
        """Build an exchange from OpenAI-style chat messages.

        The last user turn and everything that the assistant produced after it (reasoning, text, tool calls, tool
        results) are judged; earlier turns are context. `system` and `developer` messages come from the operator and are
        ignored. Images must be `data:` URLs. Raises `InputError`.
        """
        turns = _turns_of(messages)
        if not turns:
            raise InputError("the conversation has no user or assistant message: add one")
        last = turns[-1]
        return cls(last.prompt, last.images, last.response, tuple(turns[:-1]))


def _turns_of(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    if not isinstance(messages, (list, tuple)):
        raise InputError('messages must be a list of {"role": ..., "content": ...}')
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        if role in ("system", "developer"):
            continue
        if role not in ("user", "assistant", "tool"):
            raise InputError(
                f"message {number} has role {_short_description(role)}: use system, user, assistant or tool"
            )
        text, images = _content_of(message, number)
        last = turns[-1] if turns else Turn()
        if role == "user":
            if turns and not last.has_response:
                turns[-1] = Turn(_joined_lines(last.prompt, text), last.images + images)
            else:
                turns.append(Turn(text, images))
        else:
            answered = Turn(last.prompt, last.images + images, _joined_lines(last.response, text))
            turns[-1:] = [answered]
    return turns


def _joined_lines(first: str | None, second: str | None) -> str | None:
    return "\n\n".join(text for text in (first, second) if text) or None


def _content_of(message: Mapping[str, Any], number: int) -> tuple[str | None, tuple[str, ...]]:
    """Text and images of one message. Raises `InputError` for content that cannot be judged, instead of dropping it."""
    texts: list[str] = []
    images: list[str] = []
    if medium := unread_medium(message):
        raise InputError(f"message {number}: {medium!a:.40} cannot be judged: use content parts, text or image_url")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [] if content is None else content
    if not isinstance(parts, list):
        raise InputError(f"message {number}: content must be a string or a list of parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS:
            if medium := unread_medium(part):
                raise InputError(f"message {number}: {medium!a:.40} in a {kind} part cannot be judged: leave it out")
            texts.append(_string(part.get("refusal" if kind == "refusal" else "text"), number))
        elif kind in ("image_url", "input_image"):
            value = part.get("image_url")
            url = _string(value.get("url") if isinstance(value, dict) else value, number)
            if not is_data_url(url):
                raise InputError(f"message {number}: images must be data: URLs; fetch the file and inline it")
            images.append(url)
        else:
            raise InputError(
                f"message {number}: a part of type {_short_description(kind)} cannot be judged: use text or image_url"
            )
    if message.get("refusal") is not None:
        texts.append(_string(message["refusal"], number))
    fields = REASONING if message.get("role") == "assistant" else ()
    reasoning = [_as_text(message[field], number) for field in fields if message.get(field)]
    return "\n".join([*reasoning, *texts, *_calls_of(message, number)]) or None, tuple(images)


def _calls_of(message: Mapping[str, Any], number: int) -> list[str]:
    """The message's tool calls, each as `name(arguments)`."""
    calls = message.get("tool_calls")
    calls = [] if calls is None else calls
    legacy = message.get("function_call")
    if not isinstance(calls, list):
        raise InputError(f"message {number}: tool_calls must be a list")
    texts: list[str] = []
    for call in [*calls, *([] if legacy is None else [{"function": legacy}])]:
        kinds = [call[kind] for kind in ("function", "custom") if call.get(kind)] if isinstance(call, dict) else []
        if not kinds or not all(isinstance(function, dict) for function in kinds):
            raise InputError(f"message {number}: a tool call names no function: send name and arguments")
        for function in kinds:
            values = [function[field] for field in ("arguments", "input") if function.get(field) is not None]
            arguments = " ".join(_as_text(value, number) for value in values)
            texts.append(f"{_string(function.get('name', ''), number)}({arguments})")
    return texts


def _as_text(value: Any, number: int) -> str:
    """A string as it is, any other value as JSON. Raises `InputError`."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"message {number}: a tool call's arguments or a reasoning are not JSON: send text") from error


def _short_description(word: Any) -> str:
    """A short description of any value for error messages."""
    return repr(word[:40]) if isinstance(word, str) else f"of type {type(word).__name__}"


def _string(value: Any, number: int) -> str:
    if not isinstance(value, str):
        raise InputError(f"message {number}: a text or url is not a string: send a string")
    return value
