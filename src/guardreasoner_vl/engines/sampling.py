"""Generation: choose the next tokens, ban tokens, end rows, and read the label scores.

Sampling inverts the distribution function: a row's uniform number u selects the first token at which the cumulative sum
of softmax(logits / temperature) exceeds u. Each row draws from its own generator on the CPU, so that its tokens depend
only on its seed and its logits, not on the rest of the batch or the device.
The nucleus (top_p < 1) is the smallest set of likeliest tokens whose mass reaches top_p (arXiv 1904.09751).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

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
_HALF_CHARACTER = "\ufffd"
_OPENS_AGAIN = re.compile(r">\s*<")
_PLACEHOLDERS = (IMAGE_PAD, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_HEAD = 64  # likeliest tokens that are tried before the whole vocabulary is sorted
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny

ThinkState = Literal["before think", "before reasoning"]
"""The state of a row whose reasoning has not started."""


def choose_tokens(logits: torch.Tensor, rows: Sequence[GenerationRow], vocabulary: Vocabulary) -> list[int]:
    """The next token of each row, from logits of shape (rows, vocabulary); changes the logits in place."""
    logits[:, vocabulary.never] = -torch.inf
    logits[:, vocabulary.size :] = -torch.inf  # entries that only pad the embedding
    restricted: dict[ThinkState, list[int]] = {}
    for index, row in enumerate(rows):
        if state := row.think_state():
            restricted.setdefault(state, []).append(index)
    for state, indices in restricted.items():
        logits[torch.tensor(indices)[:, None], torch.tensor(vocabulary.banned(state))] = -torch.inf
    is_sampled = [row.generator is not None for row in rows]
    if not any(is_sampled):
        return _as_list(logits.argmax(-1))
    chosen = sample_tokens(
        logits,
        [row.request.temperature if sampled else 1.0 for row, sampled in zip(rows, is_sampled, strict=True)],
        [row.request.top_p if sampled else 1.0 for row, sampled in zip(rows, is_sampled, strict=True)],
        [row.uniform() for row in rows],
    )
    if not all(is_sampled):
        chosen = torch.where(torch.tensor(is_sampled, device=logits.device), chosen, logits.argmax(-1))
    return _as_list(chosen)


def _as_list(tokens: torch.Tensor) -> list[int]:
    return [int(token) for token in tokens.tolist()]


def sample_tokens(
    logits: torch.Tensor, temperatures: Sequence[float], top_ps: Sequence[float], uniforms: Sequence[float]
) -> torch.Tensor:
    """Sample one token per row, never of probability zero: logits (rows, vocabulary) -> tokens (rows,)."""
    numbers = ([max(value, _LEAST_TEMPERATURE) for value in temperatures], top_ps, uniforms)
    temperature, top_p, uniform = torch.tensor(numbers, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    shifted = logits - logits.amax(-1, keepdim=True)  # prevents an overflow at a small temperature
    probabilities = torch.softmax(shifted / temperature.to(logits.dtype), -1)
    if cut := [index for index, value in enumerate(top_ps) if value < 1.0]:
        probabilities[cut] = nucleus(probabilities[cut], top_p[cut])
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    sampled = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    # A parallel cumulative sum can grow in its last digit at a token of probability zero.
    possible = probabilities.gather(-1, sampled) > 0
    return torch.where(possible, sampled, probabilities.argmax(-1, keepdim=True)).squeeze(-1)


def nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set probabilities outside each row's nucleus to zero; shapes: (rows, vocabulary), `top_p` (rows, 1)."""
    ordered = probabilities.topk(min(_HEAD, probabilities.shape[-1])).values
    kept = _down_to(probabilities, ordered, top_p)
    flat = ordered.sum(-1, dtype=torch.float64) < top_p[:, 0]
    if flat.any():  # sort only these rows
        rows = probabilities[flat]
        kept[flat] = _down_to(rows, rows.sort(dim=-1, descending=True).values, top_p[flat])
    return kept


def _down_to(probabilities: torch.Tensor, ordered: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`nucleus`, computed from `ordered`: each row's largest probabilities in descending order, enough for `top_p`."""
    count = (ordered.cumsum(-1, dtype=torch.float64) - ordered < top_p).sum(-1, keepdim=True).clamp(min=1)
    least = ordered.gather(-1, count - 1)
    above, equal = probabilities > least, probabilities == least
    # Among equally likely tokens keep those of lowest index, whatever the sort order: bf16 logits are often equal.
    return probabilities * (above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True))))


class Vocabulary:
    """The tokenizer's vocabulary as decoding needs it: end tokens, banned tokens, texts."""

    def __init__(self, inputs: QwenInputs) -> None:
        self.tokenizer: Tokenizer = inputs.tokenizer
        self.end_ids = inputs.end_ids
        self.size = max(self.tokenizer.get_vocab().values()) + 1
        self.never = [inputs.token_id[token] for token in _PLACEHOLDERS]
        self._end_of_turn = [inputs.token_id[END_OF_TURN], inputs.token_id[END_OF_TEXT]]

    @cached_property
    def texts(self) -> dict[int, str]:
        """Maps each token to its text, with white space restored from the byte-level alphabet."""
        spaces = str.maketrans({"Ġ": " ", "Ċ": "\n", "č": "\r", "ĉ": "\t"})
        return {token: text.translate(spaces) for text, token in self.tokenizer.get_vocab().items()}

    @cached_property
    def _banned_before_reasoning(self) -> list[int]:
        """Tokens that could close an empty think: those that open a tag, and those that end the turn."""
        tags = [token for token, text in self.texts.items() if text.lstrip().startswith("<")]
        return sorted({*tags, *self._banned_before_think, *self._end_of_turn})

    @cached_property
    def _banned_before_think(self) -> list[int]:
        """Tokens that could end the think tag and open the next tag, such as `></`."""
        return sorted(token for token, text in self.texts.items() if _OPENS_AGAIN.search(text))

    def banned(self, state: ThinkState) -> list[int]:
        """Tokens that may not come next while there is no reasoning."""
        return self._banned_before_think if state == "before think" else self._banned_before_reasoning

    @cached_property
    def closing_ids(self) -> frozenset[int]:
        """Tokens that may complete a tag."""
        return frozenset(token for token, text in self.texts.items() if ">" in text)

    def text(self, ids: Sequence[int]) -> str:
        """The text of the tokens, special ones included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def first_difference(self, candidates: Sequence[str]) -> tuple[list[int], list[int]]:
        """The first tokens that the candidates share, and each candidate's first own token. Raises `InputError`."""
        encoded = [self.tokenizer.encode(word, add_special_tokens=False).ids for word in candidates]
        for place in range(min(len(ids) for ids in encoded)):
            tokens = [ids[place] for ids in encoded]
            if len(set(tokens)) == len(tokens):
                return encoded[0][:place], tokens
            if len(set(tokens)) > 1:
                break
        raise InputError(f"the candidates {candidates} do not differ at one token: use other words")


@dataclass
class GenerationRow:
    """The state of one request while it is generated."""

    request: EngineRequest
    vocabulary: Vocabulary
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[torch.Tensor | Sequence[float]] = field(default_factory=list)
    """For each token, the log-probability of each candidate in its place."""
    finish: FinishReason | None = None
    end_id: int | None = None
    reasoning_open: bool = False
    after_result: int | None = None
    """Tokens since the end of the result block; None before it."""
    chars_sent: int = 0
    """Characters that the listener has received."""
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        self.reasoning_open = not self.request.ban_empty_think
        if self.request.listener:
            self.request.listener.on_start()
        if self.request.temperature > 0:
            self.generator = torch.Generator()
            if self.request.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.request.seed)

    def uniform(self) -> float:
        """This step's random number in [0, 1); a greedy row needs none."""
        return float(torch.rand((), dtype=torch.float64, generator=self.generator)) if self.generator else 0.0

    def think_state(self) -> ThinkState | None:
        """The row's state before reasoning; None once reasoning has started, or if it is not required."""
        if self.reasoning_open:
            return None
        text = self.request.forced_prefix + self.vocabulary.text(self.tokens)
        _, opened, reasoning = text.partition(START_OF_THINK)
        self.reasoning_open = bool(reasoning.strip())
        if self.reasoning_open:
            return None
        return "before reasoning" if opened else "before think"

    def add(self, token: int) -> None:
        """Append one token, and set `finish` if the answer has ended."""
        if token in self.vocabulary.end_ids:
            self.finish, self.end_id = "stop", token
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

    def report(self) -> None:
        """Send new text to the listener, withholding an incomplete UTF-8 character; end the row if it is cancelled."""
        listener = self.request.listener
        if listener is None:
            return
        text = self.vocabulary.text(self.tokens)
        whole = text if self.finish else text.rstrip(_HALF_CHARACTER)
        if len(whole) > self.chars_sent:
            listener.on_text(whole[self.chars_sent :])
            self.chars_sent = len(whole)
        if listener.cancelled:
            self.finish = "error"

    def label_logprobs(self, common: Sequence[int]) -> dict[str, tuple[float, ...]]:
        """The candidates' log-probabilities after each field of the result block whose label was generated."""
        labels = {}
        for name in self.request.label_fields:
            place = self._place_after(name)
            if place is not None and self.tokens[place : place + len(common)] == list(common):
                label_place = place + len(common)
                if label_place < len(self.logprobs):
                    labels[name] = tuple(float(value) for value in self.logprobs[label_place])
        return labels

    def _place_after(self, name: str) -> int | None:
        """Index of the token that follows `name`; None if no token starts there."""
        generated = self.vocabulary.text(self.tokens)
        offset = label_offset(self.request.forced_prefix + generated, name)
        if offset is None or offset < len(self.request.forced_prefix):
            return None
        label = generated[offset - len(self.request.forced_prefix) :]
        places = range(len(self.tokens) + 1)
        place = bisect_left(places, -len(label), key=lambda place: -len(self.vocabulary.text(self.tokens[place:])))
        return place if self.vocabulary.text(self.tokens[place:]) == label else None
