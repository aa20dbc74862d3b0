"""Teaches the vision tower of a small model to read text in images, before it learns to judge them.

Reading does not emerge from a few thousand labelled images. Here the target of every merged patch (28 x 28 pixels) of a
drawn image is the tokens that lie in it, and its feature is trained towards their embeddings: with features
x_i, embeddings e_v of the batch's tokens and shares p_iv of the patch's text,

    L = -mean_i sum_v p_iv log softmax_v(kappa cos(x_i, e_v)) + alpha mean_i (1 - cos(x_i, sum_v p_iv e_v))
        + mean_i log(|x_i| / sum_v p_iv |e_v|)^2

The first term separates the tokens; the second aligns a feature with the sum of its tokens; the third matches lengths.
So the decoder, which knows the words, receives them as it would receive text. Halfway up the tower an auxiliary linear
head, discarded afterwards, predicts the letter in each half of a merged patch, which speeds up learning words.
Embeddings and decoder are not trained. If a GPU trains, worker processes draw the images.
"""

from __future__ import annotations

import os
import random
import re
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.vision_utils import get_vision_window_index

from guardreasoner_vl.sources.synthetic import phrases
from guardreasoner_vl.sources.synthetic.images import WORDS, draw_words
from guardreasoner_vl.sources.synthetic.pages import draw_page, printable
from guardreasoner_vl.training.master_adamw import MasterAdamW

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from PIL.Image import Image

    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.recipe import ReadingSection
    from guardreasoner_vl.sources.synthetic.images import Word

BLANK = "\n"
"""The target of a patch without words: a token that the decoder knows as empty."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NO_LETTER = len(LETTERS)
OTHER_LETTER = NO_LETTER + 1

COVERED = 0.15
"""A patch, or half of one, is blank if words cover a smaller share of its area."""

KAPPA = 30.0
"""kappa of the loss: how sharply a feature must point to its tokens."""

ALPHA = 5.0
"""alpha of the loss: the weight of the alignment term."""

MASTERED = 0.6
"""The images become more varied while at least this share of patches is read correctly."""

_VARIETY_STEP = 0.004
_WARMUP_SHARE = 0.05
_RECENT_STEPS = 20
_SNIPPETS = 0.2
_SNIPPET_WORDS = (2, 12)
_PAGE_WORDS = (2, 40)
_MOST_WORKERS = 8
_WORD = re.compile(r"[A-Za-z']+")


def learn_to_read(
    model: Any, inputs: QwenInputs, section: ReadingSection, texts: Sequence[str], seed: int, *, autocast: bool = False
) -> float:
    """Train the vision tower in place; returns the share of patches with words that it reads correctly at the end.

    The first images show made-up phrases in a plain style: black on white, one typeface, one size. The share of images
    in any style grows while most of the words are read correctly. `section.pages` of these are printed pages of
    `texts`, and a fifth of the others show snippets of them. With `autocast` the tower computes in bf16. Equal seeds
    give equal towers on a CPU; on a GPU the share of any style depends on when a worker draws an image.
    """
    tower = model.model.visual
    device = tower.device
    embeddings = model.get_input_embeddings().weight.detach().float()
    letters = LetterHead(tower.config.hidden_size * inputs.merge**2).to(device)
    parameters = [*tower.parameters(), *letters.parameters()]
    optimizer = MasterAdamW(parameters, section.learning_rate, (0.9, 0.98), 0.01)
    steps = -(-section.images // section.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP_SHARE * steps), steps)
    blank = _blank(inputs)
    recent: deque[tuple[int, int]] = deque(maxlen=_RECENT_STEPS)
    variety = torch.zeros(()).share_memory_()  # type: ignore[no-untyped-call]
    batches = _Drawn(inputs, section, texts, seed, variety)
    workers = _workers(device)
    progress = tqdm(
        DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=workers > 0),
        desc="reading",
        total=steps,
        disable=None,  # no bar if stderr is no terminal
    )
    for batch in progress:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            halfway, features = _features(tower, batch.pixels, batch.grids)
        shares = batch.shares.to(device)
        loss, pointed = reading_loss(features, embeddings, shares)
        (loss + letters.loss(halfway, batch.letters)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(_patches_read(pointed, shares, blank))
        read = _share_of_read(recent)
        if read >= MASTERED:
            variety.fill_(min(1.0, variety.item() + _VARIETY_STEP))
        progress.set_postfix(
            loss=f"{loss.item():.2f}", read=f"{read:.0%}", variety=f"{variety.item():.0%}", refresh=False
        )
    return _share_of_read(recent)


class Shares(NamedTuple):
    """The shares p_iv that are not 0, one entry each: the patch, the token and the share."""

    rows: torch.Tensor
    tokens: torch.Tensor
    shares: torch.Tensor

    @classmethod
    def of(cls, targets: Sequence[dict[int, float]]) -> Shares:
        """The entries of `patch_tokens`, for the patches in order."""
        entries = [(row, token, share) for row, shares in enumerate(targets) for token, share in shares.items()]
        return cls(*(torch.tensor(part) for part in zip(*entries, strict=True)))

    def to(self, device: torch.device) -> Shares:
        """The same on another device."""
        return Shares(*(part.to(device) for part in self))


class _Batch(NamedTuple):
    """Drawn images as the tower takes them, and what is written in them: `letters` has two entries for each patch."""

    pixels: torch.Tensor
    grids: torch.Tensor
    shares: Shares
    letters: torch.Tensor


class _Drawn(IterableDataset[_Batch]):
    """The batches of one training. Each worker draws its steps with the variety reached so far."""

    def __init__(
        self, inputs: QwenInputs, section: ReadingSection, texts: Sequence[str], seed: int, variety: torch.Tensor
    ) -> None:
        self._inputs, self._section, self._texts, self._seed, self._variety = inputs, section, texts, seed, variety

    def __iter__(self) -> Iterator[_Batch]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(first, -(-self._section.images // self._section.batch_size), stride):
            yield self._batch(random.Random(f"reading-{self._seed}-{step}"))

    def _batch(self, rng: random.Random) -> _Batch:
        variety, pages = self._variety.item(), self._section.pages
        images = [_drawn_image(rng, self._texts, variety, pages) for _ in range(self._section.batch_size)]
        return _Batch(
            torch.from_numpy(self._inputs.patches(images)).half(),  # exact enough for values of 8 bits
            torch.tensor([(1, *self._inputs.grid(image.height, image.width)) for image in images]),
            Shares.of([shares for image in images for shares in patch_tokens(image, self._inputs)]),
            torch.tensor([letter for image in images for letter in patch_letters(image, self._inputs)]),
        )


def _workers(device: torch.device) -> int:
    """Processes that draw while a GPU computes, two batches each; on a CPU they would take its cores."""
    return 0 if device.type == "cpu" else min(_MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) - 1))


def patch_tokens(image: Image, inputs: QwenInputs) -> list[dict[int, float]]:
    """For each merged patch of a drawn image, row by row: the tokens in it and their shares, which sum to 1."""

    def tokens(word: Word) -> Iterator[tuple[int, float, float]]:
        encoding = inputs.tokenizer.encode(f" {word.text}", add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield token, word.edges[max(0, start - 1)], word.edges[max(0, end - 1)]  # the leading space has no width

    blank = _blank(inputs)
    areas = _areas(image, inputs, 1, tokens)
    return [_shares(cell) if sum(cell.values()) >= COVERED else {blank: 1.0} for cell in areas]


def patch_letters(image: Image, inputs: QwenInputs) -> list[int]:
    """For the left and the right half of each merged patch, row by row: the index in `LETTERS` of its letter."""

    def letters(word: Word) -> Iterator[tuple[int, float, float]]:
        for letter, start, end in zip(word.text.lower(), word.edges, word.edges[1:], strict=False):
            place = LETTERS.find(letter)
            yield OTHER_LETTER if place < 0 else place, start, end

    areas = _areas(image, inputs, 2, letters)
    return [max(cell, key=cell.__getitem__) if sum(cell.values()) >= COVERED else NO_LETTER for cell in areas]


class LetterHead(torch.nn.Linear):
    """Predicts the letters of both halves of merged patches from the tower's hidden states halfway up."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * (OTHER_LETTER + 1))
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def loss(self, states: torch.Tensor, letters: torch.Tensor) -> torch.Tensor:
        """Cross-entropy; `states` has shape (merged patches, width), `letters` two entries for each."""
        logits = self(torch.nn.functional.rms_norm(states, states.shape[-1:]))
        return torch.nn.functional.cross_entropy(logits.view(len(letters), -1), letters.to(states.device))


def reading_loss(
    features: torch.Tensor, embeddings: torch.Tensor, targets: Shares
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of features (patches, width), and the token that each feature is closest to (patches,)."""
    rows, tokens, shares = targets
    batch_tokens, columns = torch.unique(tokens, return_inverse=True)
    known = embeddings[batch_tokens]
    cosines = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(known, dim=-1).T
    direction = -(shares * (KAPPA * cosines).log_softmax(-1)[rows, columns]).sum() / len(features)
    sums = torch.zeros_like(features).index_add(0, rows, shares[:, None] * known[columns])
    impurity = 1 - torch.nn.functional.cosine_similarity(features, sums, dim=-1)
    lengths = torch.zeros_like(features[:, 0]).index_add(0, rows, shares * known.norm(dim=-1)[columns])
    stretch = (features.norm(dim=-1) / lengths).log().square()
    return direction + ALPHA * impurity.mean() + stretch.mean(), batch_tokens[cosines.argmax(-1)]


def _patches_read(pointed: torch.Tensor, targets: Shares, blank: int) -> tuple[int, int]:
    """How many patches with words are read correctly, and how many such patches there are."""
    worded = targets.tokens != blank
    right = worded & (pointed[targets.rows] == targets.tokens)
    return int(right.sum()), len(set(targets.rows[worded].tolist()))


def _blank(inputs: QwenInputs) -> int:
    (token,) = inputs.tokens(BLANK)
    return token


def _features(tower: Any, pixels: torch.Tensor, grids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states halfway up and the features at the end, (merged patches, width) each, in the images' order."""
    states: list[torch.Tensor] = []
    middle = tower.blocks[(len(tower.blocks) - 1) // 2]
    hook = middle.register_forward_hook(lambda _, __, state: states.append(state))
    try:
        features = tower(pixels.to(tower.device, tower.dtype), grid_thw=grids.to(tower.device)).pooler_output
    finally:
        hook.remove()
    order, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    halfway = states[0].view(len(features), -1)[torch.argsort(order).to(tower.device)]
    return halfway.float(), features.float()


def _areas(
    image: Image, inputs: QwenInputs, halves: int, parts: Callable[[Word], Iterator[tuple[int, float, float]]]
) -> list[dict[int, float]]:
    """For each merged patch, split into `halves` from left to right: the area of it that each part of a word covers."""
    height, width = inputs.grid(image.height, image.width)
    rows, columns = height // inputs.merge, halves * width // inputs.merge
    across, down = columns / image.width, rows / image.height
    areas: list[dict[int, float]] = [{} for _ in range(rows * columns)]
    for word in image.info.get(WORDS, ()):
        for part, start, end in parts(word):
            for column, wide in _overlaps(start * across, end * across, columns):
                for row, high in _overlaps(word.top * down, word.bottom * down, rows):
                    cell = areas[row * columns + column]
                    cell[part] = cell.get(part, 0.0) + wide * high
    return areas


def _drawn_image(rng: random.Random, texts: Sequence[str], variety: float, pages: float) -> Image:
    phrase = phrases.phrase(rng, rng.choice(("harmful", "unharmful")))
    if rng.random() >= variety:
        return draw_words(rng, phrase, plain=True)
    if texts and rng.random() < pages:
        words = [word for word in rng.choice(texts)[:400].split() if printable(word)]
        return draw_page(rng, _snippet(rng, words, _PAGE_WORDS) or phrase)
    snippet = ""
    if texts and rng.random() < _SNIPPETS:
        snippet = _snippet(rng, _WORD.findall(rng.choice(texts)[:400]), _SNIPPET_WORDS)
    return draw_words(rng, snippet or phrase)


def _snippet(rng: random.Random, words: Sequence[str], length: tuple[int, int]) -> str:
    """Successive words of at most 15 letters each, as many as `length` allows."""
    short = [word for word in words if len(word) <= 15]
    count = rng.randint(*length)
    first = rng.randrange(max(1, len(short) - count + 1))
    return " ".join(short[first : first + count])


def _overlaps(start: float, end: float, cells: int) -> Iterator[tuple[int, float]]:
    """The cells of unit length that [start, end) overlaps, and the length of each overlap."""
    for cell in range(max(0, int(start)), min(cells, int(end) + 1)):
        length = min(end, cell + 1) - max(start, cell)
        if length > 0:
            yield cell, length


def _shares(areas: dict[int, float]) -> dict[int, float]:
    total = sum(areas.values())
    return {token: area / total for token, area in areas.items()}


def _share_of_read(counts: Collection[tuple[int, int]]) -> float:
    return sum(right for right, _ in counts) / max(1, sum(total for _, total in counts))
