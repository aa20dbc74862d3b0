"""All that crosses rooms: what is judged (`Exchange`), what comes out (`Verdict`), what is learnt from (`Sample`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from guardreasoner_vl.errors import ImageError, InputError
from guardreasoner_vl.media import unread_medium

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from guardreasoner_vl.images import Picture

ImageSource: TypeAlias = "str | Path | bytes | Image | Picture"
"""A picture: a file path, a `data:` URL, encoded bytes, a PIL image, or one that was checked already."""

Mode = Literal["slow", "fast", "hybrid"]
MODES: tuple[Mode, ...] = ("slow", "fast", "hybrid")


class Label(StrEnum):
    """The answer about a request or a response. A failure to judge is `error`, never `unharmful`."""

    HARMFUL = "harmful"
    UNHARMFUL = "unharmful"
    ERROR = "error"
    NOT_APPLICABLE = "not_applicable"


_SURROGATE = re.compile("[\ud800-\udfff]")


def unix_lines(text: str) -> str:
    """`text` with `\\r\\n` and `\\r` as `\\n`: how a file or a form ends its lines may not change a verdict."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


UnixLines: TypeAlias = Annotated[str, AfterValidator(unix_lines)]


def _present(text: str | None) -> bool:
    return bool(text and text.strip())


@dataclass(frozen=True)
class Turn:
    """One user turn and the answer to it. Whitespace alone counts as absent; line ends become `\\n`.

    Raises `InputError` for what is no text or no picture, and for strings with lone surrogates, which neither a
    tokenizer nor a file name nor a `data:` URL can hold.
    """

    prompt: str | None = None
    images: tuple[ImageSource, ...] = ()
    response: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "response"):
            object.__setattr__(self, name, _checked_text(getattr(self, name), name))
        object.__setattr__(self, "images", _checked_images(self.images))

    @property
    def has_prompt(self) -> bool:
        return _present(self.prompt) or bool(self.images)

    @property
    def has_response(self) -> bool:
        return _present(self.response)


def _checked_text(text: object, name: str) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string or null, not {type(text).__name__}")
    if _is_broken(text):
        raise InputError("the text is not valid Unicode (a lone surrogate): decode it again")
    return unix_lines(text)


def _checked_images(images: object) -> tuple[Any, ...]:
    if isinstance(images, (str, bytes, Mapping)) or not isinstance(images, Iterable):
        raise InputError("images must be a sequence of pictures: put the one picture into a tuple")
    pictures = tuple(images)
    for picture in pictures:
        if isinstance(picture, str) and _is_broken(picture):
            raise ImageError("a picture's string is not valid Unicode (a lone surrogate): encode the picture again")
        # PIL's images and `Picture` are told by their size, so that neither library nor module is imported here.
        if not (isinstance(picture, (str, bytes, Path)) or hasattr(picture, "width")):
            kind = type(picture).__name__
            raise ImageError(f"{kind} is no picture: pass a path, bytes, a data: URL or a PIL image")
    return pictures


def _is_broken(text: str) -> bool:
    return not text.isascii() and _SURROGATE.search(text) is not None


@dataclass(frozen=True)
class Exchange(Turn):
    """What a user sent to a model and what the model answered; `history` is context and is not judged.

    Raises `InputError` when there is neither a prompt, nor an image, nor a response, and what `Turn` raises.
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
        """Every picture of the conversation, in reading order."""
        return tuple(image for turn in (*self.history, self) for image in turn.images)

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]]) -> Exchange:
        """Build an exchange from OpenAI-style chat messages.

        The last user turn and everything the assistant side produced after it (text, tool calls, tool
        results) are judged; earlier turns are context. `system` and `developer` messages are the
        operator's and are left out. Pictures must be `data:` URLs. Raises `InputError`.
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
            raise InputError(f"message {number} has role {_shown(role)}: use system, user, assistant or tool")
        text, images = _content_of(message, number)
        last = turns[-1] if turns else Turn()
        if role == "user":
            if turns and not last.has_response:
                turns[-1] = Turn(_joined(last.prompt, text), last.images + images)
            else:
                turns.append(Turn(text, images))
        else:
            answered = Turn(last.prompt, last.images + images, _joined(last.response, text))
            turns[-1:] = [answered]
    return turns


def _joined(first: str | None, second: str | None) -> str | None:
    return "\n\n".join(text for text in (first, second) if text) or None


def _content_of(message: Mapping[str, Any], number: int) -> tuple[str | None, tuple[str, ...]]:
    """Text and pictures of one message; anything that could not be judged is refused, never skipped."""
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
        if kind in ("text", "input_text", "output_text", "refusal"):
            if medium := unread_medium(part):
                raise InputError(f"message {number}: {medium!a:.40} in a part of type {kind} cannot be judged")
            texts.append(_string(part.get("refusal" if kind == "refusal" else "text"), number))
        elif kind in ("image_url", "input_image"):
            value = part.get("image_url")
            url = _string(value.get("url") if isinstance(value, dict) else value, number)
            if not url[:5].lower() == "data:":
                raise InputError(f"message {number}: pictures must be data: URLs; fetch the file and inline it")
            images.append(url)
        else:
            raise InputError(f"message {number}: a part of type {_shown(kind)} cannot be judged: use text or image_url")
    if message.get("refusal") is not None:
        texts.append(_string(message["refusal"], number))
    return "\n".join([*texts, *_calls_of(message, number)]) or None, tuple(images)


def _calls_of(message: Mapping[str, Any], number: int) -> list[str]:
    """Tool calls as `name(arguments)`."""
    calls = message.get("tool_calls")
    calls = [] if calls is None else calls
    legacy = message.get("function_call")
    if not isinstance(calls, list):
        raise InputError(f"message {number}: tool_calls must be a list")
    texts: list[str] = []
    for call in [*calls, *([] if legacy is None else [{"function": legacy}])]:
        function = (call.get("function") or call.get("custom")) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise InputError(f"message {number}: a tool call names no function")
        arguments = function.get("arguments", function.get("input", ""))
        if not isinstance(arguments, str):
            try:
                arguments = json.dumps(arguments, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"message {number}: a tool call's arguments are not JSON") from error
        texts.append(f"{_string(function.get('name', ''), number)}({arguments})")
    return texts


def _shown(word: Any) -> str:
    """A short form for error texts, whatever the caller sent."""
    return repr(word[:40]) if isinstance(word, str) else f"of type {type(word).__name__}"


def _string(value: Any, number: int) -> str:
    if not isinstance(value, str):
        raise InputError(f"message {number}: a text or url is not a string")
    return value


class Frozen(BaseModel):
    """Immutable record that rejects unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Judgement(Frozen):
    """One label; `score` is the probability of *harmful* in [0, 1], or null if the engine gives none."""

    label: Label
    score: float | None = Field(default=None, ge=0.0, le=1.0)


class VerdictError(Frozen):
    """Why no judgement was possible."""

    code: str
    message: str


class ModelInfo(Frozen):
    """Which model judged; `revision` is a content hash or the hub's revision."""

    name: str
    revision: str | None = None


def same_model(one: ModelInfo, other: ModelInfo) -> bool:
    """Whether two verdicts come from one model: by revision where both have one, else by name."""
    if one.revision and other.revision:
        return one.revision == other.revision
    return one.name == other.name


class Usage(Frozen):
    """Tokens and wall-clock seconds that one verdict took (a batch's seconds are shared out equally)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            seconds=self.seconds + other.seconds,
        )


class Verdict(Frozen):
    """The guard's answer about one exchange.

    `flagged` is true if the request or the response is harmful, else null on error; `action` is what the
    caller should do, which on error follows the `on_error` policy. `unsupported_quotes` counts what `reasoning` quoted
    and the input does not hold: `[\u2026]` stands there instead.
    """

    request: Judgement
    response: Judgement
    flagged: bool | None
    action: Literal["allow", "block"]
    reasoning: str | None = None
    unsupported_quotes: int = Field(default=0, ge=0)
    mode: Mode
    error: VerdictError | None = None
    model: ModelInfo
    usage: Usage = Usage()


Modality = Literal["text", "image", "text-image"]
GoldLabel = Literal["harmful", "unharmful"]
Target = Literal["request", "response"]
"""What a label is about."""


class Sample(Frozen):
    """One labelled row of a corpus. A null label means *not labelled*; `images` are readable file paths.

    Line ends are `\\n`, as in the exchange that is judged.
    """

    id: str
    source: str
    split: str = "train"
    modality: Modality
    prompt: UnixLines = ""
    images: tuple[str, ...] = ()
    response: UnixLines | None = None
    request_label: GoldLabel | None = None
    response_label: GoldLabel | None = None
    reasoning: UnixLines | None = None
    meta: dict[str, Any] = {}

    def exchange(self) -> Exchange:
        """The exchange to be judged; raises `InputError` if the row holds nothing."""
        return Exchange(self.prompt or None, tuple(Path(path) for path in self.images), self.response)
