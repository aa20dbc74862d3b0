"""Forward passes that compute a prefix once for all sequences that begin with it.

A tree is a prefix and its branches: a prompt and its G completions, or an instruction and the rows that follow it.
Trees are packed into one row without padding,

    [prefix | branch 1 | ... | branch G | next tree's prefix | ...]

so that every linear layer processes each token once. Attention equals that of the separate sequences: a prefix attends
to itself, a branch to its prefix and itself. Positions (M-RoPE) of a branch continue those of its prefix. The result is
exact up to rounding, and it is an ordinary forward pass, compatible with gradient checkpointing and autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

NAME = "shared_prefix"
"""The attention implementation's name in transformers; a call without a layout runs SDPA."""

MOST_LOGITS = 2**28
"""The largest number of logits in memory at once: 1 GB in fp32."""

MOST_SCORES = 2**24
"""The largest number of attention scores of each head in one call on several branches: 64 MB in fp32."""

CALL_SCORES = 2**19
"""The number of scores whose computation takes about as long as one more call."""


@dataclass(frozen=True)
class Branch:
    """Token ids and their positions, of shape (3, tokens)."""

    ids: Sequence[int]
    positions: NDArray[np.int64]


@dataclass(frozen=True)
class Tree:
    """A prefix and the branches that continue it; each has at least one token, or `ValueError` is raised."""

    prefix: Branch
    branches: tuple[Branch, ...]

    def __post_init__(self) -> None:
        if not (self.prefix.ids and self.branches and all(branch.ids for branch in self.branches)):
            raise ValueError("a tree needs a prefix and branches of at least one token each")

    @property
    def tokens(self) -> int:
        """The number of tokens of the prefix and the branches."""
        return len(self.prefix.ids) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class TreeSpan:
    """A tree's place in the row: where its prefix starts, and the lengths of prefix and branches in tokens."""

    start: int
    prefix: int
    branches: tuple[int, ...]


@dataclass(frozen=True)
class Packed:
    """One row of L tokens: `ids` (1, L), `positions` (3, 1, L), and each tree's place.

    `predicts` (T,) are the indices whose outputs predict the branches' T tokens in order, `targets` (T,) these tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[TreeSpan, ...]
    predicts: torch.Tensor
    targets: torch.Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(
            self.ids.to(device),
            self.positions.to(device),
            self.spans,
            self.predicts.to(device),
            self.targets.to(device),
        )


def completion(ids: Sequence[int], next_position: int) -> Branch:
    """A branch of text whose positions start at `next_position`."""
    return Branch(ids, np.broadcast_to(np.arange(len(ids)) + next_position, (3, len(ids))))


def pack(trees: Sequence[Tree]) -> Packed:
    """Pack all trees into one row."""
    ids: list[int] = []
    positions, spans = [], []
    predicts: list[int] = []
    targets: list[int] = []
    for tree in trees:
        start, last = len(ids), len(ids) + len(tree.prefix.ids) - 1
        ids += tree.prefix.ids
        positions.append(tree.prefix.positions)
        for branch in tree.branches:
            predicts += [last, *range(len(ids), len(ids) + len(branch.ids) - 1)]
            targets += branch.ids
            ids += branch.ids
            positions.append(branch.positions)
        spans.append(TreeSpan(start, len(tree.prefix.ids), tuple(len(branch.ids) for branch in tree.branches)))
    return Packed(
        torch.tensor([ids]),
        torch.from_numpy(np.concatenate(positions, axis=1))[:, None],
        tuple(spans),
        torch.tensor(predicts),
        torch.tensor(targets),
    )


def use_shared_prefix(model: Any) -> None:
    """Switch a Qwen2.5-VL's decoder to an attention that accepts packed rows; other rows are computed by SDPA."""
    model.model.language_model.set_attn_implementation(NAME)


def log_probabilities(
    model: Any, packed: Packed, vision: Mapping[str, torch.Tensor] | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of each branch token, of shape (T,), in fp32, under the policy that samples at `temperature`.

    `vision` holds the images in order. If the logits of all tokens exceed `MOST_LOGITS`, they are computed in pieces,
    and recomputed in the backward pass.
    """
    hidden = _hidden(model, packed, vision)
    rows = max(1, MOST_LOGITS // model.config.text_config.vocab_size)
    pieces = list(zip(torch.split(hidden, rows), torch.split(packed.targets, rows), strict=True))
    if len(pieces) == 1:
        return _head(model, hidden, packed.targets, temperature)
    return torch.cat([checkpoint(_head, model, *piece, temperature, use_reentrant=False) for piece in pieces])


def arguments(packed: Packed) -> dict[str, Any]:
    """The arguments for a model with `use_shared_prefix`, without the images."""
    return {
        "input_ids": packed.ids,
        "position_ids": packed.positions,
        "attention_mask": {"full_attention": None},
        "layout": PackedLayout.of(packed),
    }


def _hidden(model: Any, packed: Packed, vision: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """The last hidden states that predict branch tokens, of shape (T, width)."""
    output = model.model(**arguments(packed), use_cache=False, **(vision or {}))
    states: torch.Tensor = output.last_hidden_state[0]
    return states[packed.predicts]


def _head(model: Any, hidden: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    scores = model.lm_head(hidden).float()
    return -cross_entropy(scores if temperature == 1 else scores / temperature, targets, reduction="none")


@dataclass(frozen=True)
class _BranchCall:
    """Indices of branches whose attention is computed in one call.

    `gather` (G, T) are the indices of the branches' tokens, padded at their ends; `mask` (T, P + T) is True where a
    branch token attends to prefix and branch; `real` are the flat (G * T) indices without padding, None if nothing is
    padded.
    """

    gather: torch.Tensor
    mask: torch.Tensor
    real: torch.Tensor | None

    def to(self, device: torch.device) -> _BranchCall:
        real = None if self.real is None else self.real.to(device)
        return _BranchCall(self.gather.to(device), self.mask.to(device), real)


@dataclass(frozen=True)
class _TreeGroup:
    """One tree's indices for attention.

    `order` (tokens,) puts the calls' outputs, one after the other, into the order of the branches' tokens; None if they
    are in this order.
    """

    start: int
    prefix: int
    calls: tuple[_BranchCall, ...]
    order: torch.Tensor | None

    def to(self, device: torch.device) -> _TreeGroup:
        order = None if self.order is None else self.order.to(device)
        return _TreeGroup(self.start, self.prefix, tuple(call.to(device) for call in self.calls), order)


@dataclass(frozen=True)
class PackedLayout:
    """The structure of a packed row that attention needs."""

    groups: tuple[_TreeGroup, ...]

    @classmethod
    def of(cls, packed: Packed) -> PackedLayout:
        """The layout of a packed row, on the device of its ids."""
        return cls(tuple(_group(span, packed.ids.device) for span in packed.spans))

    def to(self, device: torch.device) -> PackedLayout:
        """The same on another device."""
        return PackedLayout(tuple(group.to(device) for group in self.groups))


def _group(span: TreeSpan, device: torch.device) -> _TreeGroup:
    lengths = torch.tensor(span.branches, device=device)
    starts = span.start + span.prefix + lengths.cumsum(0) - lengths
    chosen = [torch.tensor(numbers, device=device) for numbers in _calls(span)]
    calls = tuple(_branch_call(lengths[numbers], starts[numbers], span.prefix) for numbers in chosen)
    if len(calls) == 1:
        return _TreeGroup(span.start, span.prefix, calls, None)
    places = [call.gather.flatten() if call.real is None else call.gather.flatten()[call.real] for call in calls]
    return _TreeGroup(span.start, span.prefix, calls, torch.cat(places).argsort())


def _calls(span: TreeSpan) -> list[list[int]]:
    """The branches' numbers for each call: all in order, or several calls from the longest branch on.

    A call is padded to its longest branch. The calls have the fewest scores, padding included, if one more call counts
    as `CALL_SCORES`; a call of more than one branch has at most `MOST_SCORES`.
    """
    longest_first = sorted(range(len(span.branches)), key=lambda number: -span.branches[number])
    scores = [span.branches[number] * (span.prefix + span.branches[number]) for number in longest_first]
    cheapest, starts = [0], [0]  # for the first n branches: the cost, and where the last call starts
    for end in range(1, len(scores) + 1):
        costs = {
            start: cheapest[start] + CALL_SCORES + (end - start) * scores[start]
            for start in range(end)
            if start == end - 1 or (end - start) * scores[start] <= MOST_SCORES
        }
        starts.append(min(costs, key=costs.__getitem__))
        cheapest.append(costs[starts[-1]])
    calls: list[list[int]] = []
    end = len(scores)
    while end:
        calls.insert(0, longest_first[starts[end] : end])
        end = starts[end]
    return calls if len(calls) > 1 else [sorted(longest_first)]


def _branch_call(lengths: torch.Tensor, starts: torch.Tensor, prefix: int) -> _BranchCall:
    longest = int(lengths.max())
    steps = torch.arange(longest, device=lengths.device)
    inside = steps < lengths[:, None]
    gather = starts[:, None] + steps.minimum(lengths[:, None] - 1)
    causal = torch.ones(longest, longest, dtype=torch.bool, device=lengths.device).tril()
    mask = torch.cat((causal.new_ones(longest, prefix), causal), dim=1)
    real = None if bool(inside.all()) else inside.flatten().nonzero()[:, 0]
    return _BranchCall(gather, mask, real)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: PackedLayout | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query, key and value (1, heads, L, width) give (1, L, heads, width)."""
    if layout is None:
        ordinary, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
        return ordinary, None
    grouped = key.shape[1] != query.shape[1]
    pieces = []
    for group in layout.groups:
        prefix_places = slice(group.start, group.start + group.prefix)
        prefix_key, prefix_value = key[:, :, prefix_places], value[:, :, prefix_places]
        pieces.append(
            scaled_dot_product_attention(
                query[:, :, prefix_places], prefix_key, prefix_value, is_causal=True, scale=scaling, enable_gqa=grouped
            )[0].transpose(0, 1)
        )
        outputs = [
            _masked_attention(
                _branches(query, call),
                _prefixed(prefix_key, _branches(key, call)),
                _prefixed(prefix_value, _branches(value, call)),
                call,
                scaling,
            )
            for call in group.calls
        ]
        pieces += outputs if group.order is None else [torch.cat(outputs)[group.order]]
    return torch.cat(pieces)[None], None


def _masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _BranchCall, scaling: float | None
) -> torch.Tensor:
    """Attention of (G, heads, T, width) to (G, key heads, P + T, width): (tokens, heads, width) without padding.

    An accelerator's fused kernels accept a mask or grouped heads, not both: there each key head is repeated.
    """
    if query.device.type != "cpu":
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    grouped = key.shape[1] != query.shape[1]
    attended = scaled_dot_product_attention(query, key, value, attn_mask=call.mask, scale=scaling, enable_gqa=grouped)
    outputs = attended.transpose(1, 2).flatten(0, 1)
    return outputs if call.real is None else outputs[call.real]


def _branches(states: torch.Tensor, call: _BranchCall) -> torch.Tensor:
    """(1, heads, L, width) -> (G, heads, T, width)."""
    count, longest = call.gather.shape
    chosen = states[0].index_select(1, call.gather.flatten())
    return chosen.view(len(chosen), count, longest, -1).transpose(0, 1)


def _prefixed(prefix: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    return torch.cat((prefix.expand(len(branches), -1, -1, -1), branches), dim=2)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
