"""One row's generation: which token comes next, what is banned, when it ends, what its labels scored."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from guardreasoner_vl.engines.label_scores import label_offset
from guardreasoner_vl.engines.qwen import END_OF_TEXT, END_OF_TURN, IMAGE_PAD
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.protocol import END_OF_RESULT, MAX_TOKENS_AFTER_RESULT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from guardreasoner_vl.engines.base import EngineRequest, FinishReason
    from guardreasoner_vl.engines.qwen import QwenInputs

START_OF_THINK = "<think>"
_TAIL_TOKENS = 16
_OPENS_AGAIN = re.compile(r">\s*<")
_PLACEHOLDERS = (IMAGE_PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


class Vocabulary:
    """What decoding needs to know of a tokenizer."""

    def __init__(self, inputs: QwenInputs) -> None:
        self.tokenizer: Tokenizer = inputs.tokenizer
        self.end_ids = inputs.end_ids
        self.size = max(self.tokenizer.get_vocab().values()) + 1
        self.never = [inputs.token_id[token] for token in _PLACEHOLDERS]
        self._end_of_turn = [inputs.token_id[END_OF_TURN], inputs.token_id[END_OF_TEXT]]

    @cached_property
    def _pieces(self) -> dict[int, str]:
        """Each token's text, spaces and newlines restored from the byte-level alphabet."""
        spaces = str.maketrans({"Ġ": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"})
        return {number: piece.translate(spaces) for piece, number in self.tokenizer.get_vocab().items()}

    @cached_property
    def banned_before_reasoning(self) -> list[int]:
        """Tokens that could close an empty think: any that opens a tag, and the end of the turn."""
        tags = [number for number, piece in self._pieces.items() if piece.lstrip().startswith("<")]
        return sorted({*tags, *self.banned_before_think, *self._end_of_turn})

    @cached_property
    def banned_before_think(self) -> list[int]:
        """Tokens that could end the think tag and open the next one at once, such as `></`."""
        return sorted(number for number, piece in self._pieces.items() if _OPENS_AGAIN.search(piece))

    @cached_property
    def closing_ids(self) -> frozenset[int]:
        """Tokens after which a tag may be complete."""
        return frozenset(number for number, piece in self._pieces.items() if ">" in piece)

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def first_difference(self, candidates: Sequence[str]) -> tuple[list[int], list[int]]:
        """The candidates' common first tokens, and each one's first differing token. Raises `InputError`."""
        encoded = [self.tokenizer.encode(word, add_special_tokens=False).ids for word in candidates]
        for place in range(min(len(ids) for ids in encoded)):
            here = [ids[place] for ids in encoded]
            if len(set(here)) == len(here):
                return encoded[0][:place], here
            if len(set(here)) > 1:
                break
        raise InputError(f"the candidates {candidates} do not differ at one token: use other words")


@dataclass
class Row:
    """The state of one request while it is generated."""

    request: EngineRequest
    vocabulary: Vocabulary
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[torch.Tensor] = field(default_factory=list)
    finish: FinishReason | None = None
    reasoning_open: bool = False
    after_result: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.reasoning_open = not self.request.ban_empty_think
        if self.request.temperature > 0:
            self.generator = torch.Generator()
            if self.request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.request.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from this row's logits (vocabulary,), which are changed in place."""
        logits[self.vocabulary.never] = -torch.inf
        logits[self.vocabulary.size :] = -torch.inf  # rows that only pad the embedding
        if not self.reasoning_open:
            logits[self._banned()] = -torch.inf
        if self.generator is None:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.cpu() / self.request.temperature, dim=-1)
        ordered, order = probabilities.sort(descending=True)
        keep = (ordered.cumsum(0) - ordered) < self.request.top_p
        return int(order[torch.multinomial(ordered * keep, 1, generator=self.generator)])

    def _banned(self) -> list[int]:
        """What may not come next as long as no reasoning stands."""
        text = self.request.forced_prefix + self.vocabulary.text(self.tokens)
        _, opened, reasoning = text.partition(START_OF_THINK)
        if not opened:
            return self.vocabulary.banned_before_think
        self.reasoning_open = bool(reasoning.strip())
        return [] if self.reasoning_open else self.vocabulary.banned_before_reasoning

    def add(self, token: int) -> None:
        """Take one token and see whether the answer has ended."""
        if token in self.vocabulary.end_ids:
            self.finish = "stop"
            return
        self.tokens.append(token)
        if self.after_result is not None:
            self.after_result += 1
        elif token in self.vocabulary.closing_ids:
            tail = self.vocabulary.text(self.tokens[-_TAIL_TOKENS:])
            self.after_result = 0 if END_OF_RESULT in tail else None
        overrun = self.after_result is not None and self.after_result > MAX_TOKENS_AFTER_RESULT
        if overrun or len(self.tokens) >= self.limit:
            self.finish = "length"

    def label_logprobs(self, common: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """The candidates' log-probabilities after each field of the result block whose label was generated."""
        found = {}
        for name in self.request.label_fields:
            place = self._place_after(name)
            if place is not None and self.tokens[place : place + len(common)] == list(common):
                at = place + len(common)
                if at < len(self.logprobs):
                    found[name] = tuple(float(value) for value in self.logprobs[at])
        return found

    def _place_after(self, name: str) -> int | None:
        """Index of the token that follows `name`; None if no token begins there."""
        generated = self.vocabulary.text(self.tokens)
        offset = label_offset(self.request.forced_prefix + generated, name)
        if offset is None or offset < len(self.request.forced_prefix):
            return None
        label = generated[offset - len(self.request.forced_prefix) :]
        places = range(len(self.tokens) + 1)
        place = bisect_left(places, -len(label), key=lambda place: -len(self.vocabulary.text(self.tokens[place:])))
        return place if self.vocabulary.text(self.tokens[place:]) == label else None
