"""Teaches the vision tower of a small model to read text in images, before it learns to judge them.

Reading does not emerge from a few thousand labelled images. Here the target of every merged patch (28 x 28 pixels) of a
drawn image is the tokens that lie in it, and its feature is trained towards their embeddings: with features
x_i, embeddings e_v of the batch's tokens and shares p_iv of the patch's text,

    L = -mean_i sum_v p_iv log softmax_v(kappa cos(x_i, e_v)) + alpha mean_i (1 - cos(x_i, sum_v p_iv e_v))
        + mean_i log(|x_i| / sum_v p_iv |e_v|)^2

The first term separates the tokens; the second aligns a feature with the sum of its tokens; the third matches lengths.
So the decoder, which knows the words, receives them as it would receive text. Halfway up the tower an auxiliary linear
head, discarded afterwards, predicts the letter in each half of a merged patch, which makes words be learnt sooner.
Embeddings and decoder are not trained.
"""

from __future__ import annotations

import random
import re
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.vision_utils import get_vision_window_index

from guardreasoner_vl.sources.synthetic import phrases
from guardreasoner_vl.sources.synthetic.images import WORDS, draw_words
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
_WORD = re.compile(r"[A-Za-z']+")


def learn_to_read(model: Any, inputs: QwenInputs, section: ReadingSection, texts: Sequence[str], seed: int) -> float:
    """Train the vision tower in place; returns the share of patches with words that it reads correctly at the end.

    The first images show made-up phrases in a plain style: black on white, one typeface, one size. The share of images
    in any style, a fifth of them snippets of `texts`, grows while most of the words are read correctly.
    """
    tower = model.model.visual
    embeddings = model.get_input_embeddings().weight.detach().float()
    letters = LetterHead(tower.config.hidden_size * inputs.merge**2).to(tower.device)
    parameters = [*tower.parameters(), *letters.parameters()]
    optimizer = MasterAdamW(parameters, section.learning_rate, (0.9, 0.98), 0.01)
    steps = -(-section.images // section.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(_WARMUP_SHARE * steps), steps)
    rng = random.Random(f"reading-{seed}")
    blank = _blank(inputs)
    recent: deque[tuple[int, int]] = deque(maxlen=_RECENT_STEPS)
    progress = tqdm(range(steps), desc="reading", disable=None)  # no bar if stderr is no terminal
    variety = 0.0
    for _ in progress:
        images = [_page(rng, texts, variety) for _ in range(section.batch_size)]
        targets = [shares for image in images for shares in patch_tokens(image, inputs)]
        shown = [letter for image in images for letter in patch_letters(image, inputs)]
        halfway, features = _features(tower, images, inputs)
        loss, pointed = reading_loss(features, embeddings, targets)
        (loss + letters.loss(halfway, shown)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        predictions = zip(pointed.tolist(), targets, strict=True)
        written = [token in shares for token, shares in predictions if blank not in shares]
        recent.append((sum(written), len(written)))
        read = _share(recent)
        if read >= MASTERED:
            variety = min(1.0, variety + _VARIETY_STEP)
        progress.set_postfix(loss=f"{loss.item():.2f}", read=f"{read:.0%}", variety=f"{variety:.0%}", refresh=False)
    return _share(recent)


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

    def loss(self, states: torch.Tensor, letters: Sequence[int]) -> torch.Tensor:
        """Cross-entropy; `states` has shape (merged patches, width), `letters` two entries for each."""
        logits = self(torch.nn.functional.rms_norm(states, states.shape[-1:]))
        targets = torch.tensor(letters, device=states.device)
        return torch.nn.functional.cross_entropy(logits.view(len(letters), -1), targets)


def reading_loss(
    features: torch.Tensor, embeddings: torch.Tensor, targets: Sequence[dict[int, float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of features (patches, width), and the token that each feature is closest to (patches,)."""
    entries = [(row, token, share) for row, shares in enumerate(targets) for token, share in shares.items()]
    rows, tokens, shares = (torch.tensor(part, device=features.device) for part in zip(*entries, strict=True))
    shown, columns = torch.unique(tokens, return_inverse=True)
    known = embeddings[shown]
    cosines = torch.nn.functional.normalize(features, dim=-1) @ torch.nn.functional.normalize(known, dim=-1).T
    direction = -(shares * (KAPPA * cosines).log_softmax(-1)[rows, columns]).sum() / len(targets)
    sums = torch.zeros_like(features).index_add(0, rows, shares[:, None] * known[columns])
    impurity = 1 - torch.nn.functional.cosine_similarity(features, sums, dim=-1)
    lengths = torch.zeros_like(features[:, 0]).index_add(0, rows, shares * known.norm(dim=-1)[columns])
    stretch = (features.norm(dim=-1) / lengths).log().square()
    return direction + ALPHA * impurity.mean() + stretch.mean(), shown[cosines.argmax(-1)]


def _blank(inputs: QwenInputs) -> int:
    (token,) = inputs.tokens(BLANK)
    return token


def _features(tower: Any, images: Sequence[Image], inputs: QwenInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The states halfway up and the features at the end, (merged patches, width) each, in the images' order."""
    grids = torch.tensor([(1, *inputs.grid(image.height, image.width)) for image in images])
    pixels = torch.from_numpy(inputs.patches(images)).to(tower.device, tower.dtype)
    states: list[torch.Tensor] = []
    middle = tower.blocks[(len(tower.blocks) - 1) // 2]
    hook = middle.register_forward_hook(lambda _, __, state: states.append(state))
    try:
        features = tower(pixels, grid_thw=grids.to(tower.device)).pooler_output
    finally:
        hook.remove()
    order, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    halfway = states[0].view(len(features), -1)[torch.argsort(order).to(tower.device)]
    return halfway.float(), features.float()


def _areas(
    image: Image, inputs: QwenInputs, halves: int, parts: Callable[[Word], Iterator[tuple[int, float, float]]]
) -> list[dict[int, float]]:
    """For each merged patch, split into `halves` from left to right: the area that each part of a word covers of it."""
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


def _page(rng: random.Random, texts: Sequence[str], variety: float) -> Image:
    phrase = phrases.phrase(rng, rng.choice(("harmful", "unharmful")))
    if rng.random() >= variety:
        return draw_words(rng, phrase, plain=True)
    snippet = _snippet(rng, rng.choice(texts)) if texts and rng.random() < _SNIPPETS else ""
    return draw_words(rng, snippet or phrase)


def _snippet(rng: random.Random, text: str) -> str:
    words = [word for word in _WORD.findall(text[:400]) if len(word) <= 15]
    count = rng.randint(*_SNIPPET_WORDS)
    first = rng.randrange(max(1, len(words) - count + 1))
    return " ".join(words[first : first + count])


def _overlaps(start: float, end: float, cells: int) -> Iterator[tuple[int, float]]:
    """The cells of unit length that [start, end) overlaps, and the length of each overlap."""
    for cell in range(max(0, int(start)), min(cells, int(end) + 1)):
        length = min(end, cell + 1) - max(start, cell)
        if length > 0:
            yield cell, length


def _shares(areas: dict[int, float]) -> dict[int, float]:
    total = sum(areas.values())
    return {token: area / total for token, area in areas.items()}


def _share(counts: Collection[tuple[int, int]]) -> float:
    return sum(right for right, _ in counts) / max(1, sum(total for _, total in counts))
