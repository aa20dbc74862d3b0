"""What is trained on."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.types import Modality

SAMPLES = "samples"
"""The adapter for rows of our own."""


class SourceSection(Section):
    """One data set: a folder below `--data`, or `hub:OWNER/NAME@REVISION`, read by the `adapter` of that name.

    The adapter `samples` reads our own rows (JSONL or Parquet); for it `origin` and `licence` say where an outsider
    gets them, the others know. `only` keeps rows whose field (or `meta.field`) has one of the values; `share` and
    `limit` draw rows; `test_share` of them are never trained on (split `test`); `weak_share` is the share of rows
    marked `meta.weak` that is kept; `repeat` counts rows several times; `unlabelled` keeps rows without any label,
    which get those of the same content in the folder `labels_from` (adapter `guardreasoner-vltrain`), or a teacher's.
    """

    folder: str
    adapter: str = SAMPLES
    name: str = ""
    origin: str = ""
    licence: str = ""
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    share: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    test_share: float = Field(default=0.0, ge=0, lt=1)
    weak_share: float = Field(default=0.5, ge=0, le=1)
    repeat: int = Field(default=1, ge=1)
    unlabelled: bool = False
    labels_from: str | None = None
    image_kind: str | None = None
    image_text: str | None = None

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.adapter == SAMPLES and not (self.origin and self.licence):
            raise ValueError("give origin and licence: where others get these rows, and under which terms")
        if self.labels_from and not self.unlabelled:
            raise ValueError("labels_from is for rows without labels; set unlabelled: true")
        return self

    @property
    def title(self) -> str:
        """The name under which its rows stand."""
        return self.name or (self.folder if self.adapter == SAMPLES else self.adapter)


class MadeSection(Section):
    """Rows that the project makes itself; `test_share` of them are never trained on (split `test`)."""

    count: int = Field(ge=1)
    test_share: float = Field(default=0.0, ge=0, lt=1)
    repeat: int = Field(default=1, ge=1)


class JoinedSection(Section):
    """Rows made of the other training rows (`sources.joined`): `share` of all texts trained on, half of them harmful.

    `long` of them are 1,000 to 2,000 tokens long, which `sft.max_length` has to allow. Another `seed` draws others.
    """

    share: float = Field(default=0.12, gt=0, lt=1)
    long: float = Field(default=0.03, ge=0, le=1)
    seed: int = 0


class VariedSection(Section):
    """Texts changed at the surface, labels kept (`sources.variation`): `share` of the training rows of text alone.

    Of a varied row with an answer, `answers` is the chance that the answer is changed too. Another `seed` draws others.
    """

    share: float = Field(default=0.15, gt=0, le=1)
    answers: float = Field(default=0.25, ge=0, le=1)
    seed: int = 0


class DuplicatesSection(Section):
    """What counts as the same content (`sources.duplicates`): the texts' Jaccard index, the images' differing bits.

    Rows near one of `against` (benchmarks by name, or files below `--data`) are dropped.
    """

    text: float = Field(default=0.8, gt=0, le=1)
    image: int = Field(default=4, ge=0, le=32)
    against: tuple[str, ...] = ()


class BalanceSection(Section):
    """Shares reached by leaving rows out: of harmful rows inside each modality, and of each modality."""

    harmful: float | None = Field(default=None, gt=0, lt=1)
    modalities: dict[Modality, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.modalities and not (
            all(share > 0 for share in self.modalities.values()) and abs(sum(self.modalities.values()) - 1) < 1e-6
        ):
            raise ValueError("modalities are shares of the corpus: positive, 1 together")
        return self


class DataSection(Section):
    """What is trained on; rows of other modalities than the named ones are left out.

    `drawn` are images of words (`sources.synthetic.images`), `written` exchanges with and without signs
    (`sources.synthetic.exchanges`), `contrast` harmless requests beside harmful ones in the same words
    (`sources.synthetic.contrast`).
    `joined` adds rows made of training rows, then `varied` changes some texts; held-out and test rows stay as they are.

    `categories` maps a source's own category to one of the taxonomy (`sources.categories`), beside the built-in map.
    """

    sources: tuple[SourceSection, ...] = ()
    drawn: MadeSection | None = None
    written: MadeSection | None = None
    contrast: MadeSection | None = None
    joined: JoinedSection | None = None
    varied: VariedSection | None = None
    modalities: tuple[Modality, ...] = ("text", "image", "text-image")
    duplicates: DuplicatesSection | None = None
    balance: BalanceSection | None = None
    categories: dict[str, str] = Field(default_factory=dict)

    @property
    def needs_curation(self) -> bool:
        """Whether it asks for more than mixing."""
        return self.duplicates is not None or self.balance is not None
