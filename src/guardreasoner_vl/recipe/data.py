"""Settings of the training data."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, model_validator

from guardreasoner_vl.recipe.base import Section
from guardreasoner_vl.types import Modality

SAMPLES = "samples"
"""The adapter for rows in the project's own layout."""

_TEST_SHARE = (
    "Share of the rows that is never trained on and becomes the split `test`; chosen by a hash of the row's id. "
    "0 sets none apart."
)
_REPEAT = "How often training takes each row in one epoch."


class SourceSection(Section):
    """One data set of the mixture."""

    renamed_keys: ClassVar[dict[str, str]] = {"picture": "image_kind", "picture_text": "image_text"}

    folder: str = Field(
        description="Where the data set lies: a folder below `--data`, or `hub:OWNER/NAME@REVISION` on the model hub."
    )
    adapter: str = Field(
        default=SAMPLES,
        description="The reader of the data set's format, by name. `samples` reads rows in the project's own layout "
        "(JSONL or Parquet).",
    )
    name: str = Field(
        default="",
        description="Name under which the rows appear in the corpus. Empty: the adapter's name, or the folder for "
        "`samples`.",
    )
    origin: str = Field(
        default="",
        description="Where others get these rows; shown on the corpus's card. Required for `samples`; other adapters "
        "know their own.",
    )
    licence: str = Field(
        default="",
        description="Terms of the data set; shown on the corpus's card. Required for `samples`; other adapters know "
        "their own.",
    )
    only: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Keep only rows whose field (or `meta` field) of this name has one of the listed values, compared "
        "as text. Empty keeps all rows.",
    )
    share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the training rows that is kept, drawn at random (paper, section 3.1: 0.5 of SPA-VL, 0.6 "
        "of HOD). 1 keeps all.",
    )
    limit: int | None = Field(
        default=None,
        ge=1,
        description="Largest number of training rows to keep, drawn at random after `share`. Null: no limit.",
    )
    test_share: float = Field(default=0.0, ge=0, lt=1, description=_TEST_SHARE)
    weak_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the rows with weak labels (`meta.weak`) that is kept for training. 0 drops them, 1 keeps "
        "all.",
    )
    repeat: int = Field(default=1, ge=1, description=_REPEAT)
    unlabelled: bool = Field(
        default=False,
        description="Keep rows without any label. They get the labels of `labels_from` where the content is the same; "
        "a teacher labels the rest by majority vote.",
    )
    labels_from: str | None = Field(
        default=None,
        description="Folder (adapter `guardreasoner-vltrain`) whose labels are taken for rows of the same content. "
        "Needs `unlabelled: true`. Null: none.",
    )
    image_kind: str | None = Field(
        default=None,
        description="What the source's images show, in a few words, for the offline teacher's reasoning. Null: "
        "unknown.",
    )
    image_text: str | None = Field(
        default=None,
        description="Name of the `meta` field that holds the words in the image, for the offline teacher's reasoning. "
        "Null: the row's own `meta.image_text`, if any.",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.adapter == SAMPLES and not (self.origin and self.licence):
            raise ValueError("give origin and licence: where others get these rows, and under which terms")
        if self.labels_from and not self.unlabelled:
            raise ValueError("labels_from is for rows without labels; set unlabelled: true")
        return self

    @property
    def title(self) -> str:
        """The source's name in the corpus."""
        return self.name or (self.folder if self.adapter == SAMPLES else self.adapter)


class MadeSection(Section):
    """Rows that the project generates itself."""

    count: int = Field(ge=1, description="Number of rows to generate, test rows included.")
    test_share: float = Field(default=0.0, ge=0, lt=1, description=_TEST_SHARE)
    repeat: int = Field(default=1, ge=1, description=_REPEAT)


class JoinedSection(Section):
    """Training rows joined with harmless sentences, with each other or with forged verdicts (`sources.joined`)."""

    share: float = Field(
        default=0.12,
        gt=0,
        lt=1,
        description="Share of joined rows among all training texts afterwards; half of the joined rows are harmful.",
    )
    long: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="Share of the joined rows that are 1,000 to 2,000 tokens long; `sft.max_length` must allow them. "
        "0: none.",
    )
    seed: int = Field(default=0, description="Seed of the draw, combined with the recipe's `seed`.")


class RenderedSection(Section):
    """Requests of training rows shown in images instead of typed, or typed beside an image (`sources.rendered`)."""

    share: float = Field(
        gt=0,
        lt=1,
        description="Share of rendered rows among them and the sources' training rows; half of them have a harmful "
        "request.",
    )
    seed: int = Field(default=0, description="Seed of the draw, combined with the recipe's `seed`.")


class VariedSection(Section):
    """Texts changed at the surface (typing errors, look-alike letters, formats), labels kept (`sources.variation`)."""

    share: float = Field(default=0.15, gt=0, le=1, description="Share of the text-only training rows that are changed.")
    answers: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Chance that the response of a changed row is changed too. 0 never changes responses.",
    )
    seed: int = Field(default=0, description="Seed of the choice, combined with the recipe's `seed`.")


class DuplicatesSection(Section):
    """What counts as the same content (`sources.duplicates`)."""

    text: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Lowest Jaccard index of two texts' 5-word groups at which the texts are near duplicates. 1: only "
        "equal sets of groups.",
    )
    image: int = Field(
        default=4,
        ge=0,
        le=32,
        description="Largest number of differing bits, of 64, of two images' perceptual hashes at which the images are "
        "near duplicates. 0: equal hashes only.",
    )
    against: tuple[str, ...] = Field(
        default=(),
        description="Benchmarks by name, or files below `--data`; training rows near one of their rows are dropped. "
        "Empty: compare with nothing.",
    )


class BalanceSection(Section):
    """Target shares, reached by leaving rows out at random."""

    harmful: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of harmful rows among the labelled rows of each modality. Null: as they come.",
    )
    modalities: dict[Modality, float] = Field(
        default_factory=dict,
        description="Share of each modality in the corpus; positive, 1 together (paper, Table 6: text 0.518, image "
        "0.108, text-image 0.374). Empty: as they come.",
    )

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.modalities and not (
            all(share > 0 for share in self.modalities.values()) and abs(sum(self.modalities.values()) - 1) < 1e-6
        ):
            raise ValueError("modalities are shares of the corpus: positive, 1 together")
        return self


class DataSection(Section):
    """What is trained on (paper, section 3.1).

    `rendered` and `joined` add rows made of training rows, then `varied` changes some texts; validation and test rows
    stay as they are.
    """

    renamed_keys: ClassVar[dict[str, str]] = {"drawn": "synthetic_images", "written": "synthetic_exchanges"}

    sources: tuple[SourceSection, ...] = Field(default=(), description="The data sets of the mixture.")
    synthetic_images: MadeSection | None = Field(
        default=None,
        description="Generate images of words, unless only text is trained (`sources.synthetic.images`); their rows "
        "have the source `drawn`. Null: none.",
    )
    synthetic_exchanges: MadeSection | None = Field(
        default=None,
        description="Generate exchanges with and without a sign (`sources.synthetic.exchanges`); their rows have the "
        "source `written`. Null: none.",
    )
    contrast: MadeSection | None = Field(
        default=None,
        description="Generate harmless requests beside harmful ones in the same words (`sources.synthetic.contrast`). "
        "Null: none.",
    )
    joined: JoinedSection | None = Field(
        default=None, description="Add rows that are made by joining training rows. Null: none."
    )
    rendered: RenderedSection | None = Field(
        default=None,
        description="Add rows whose requests are drawn as images, unless only text is trained. Null: none.",
    )
    varied: VariedSection | None = Field(
        default=None, description="Change some training texts at the surface. Null: none."
    )
    modalities: tuple[Modality, ...] = Field(
        default=("text", "image", "text-image"), description="Modalities to keep; other rows are left out."
    )
    validation_share: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Share of every source's rows that is held out and becomes the split `validation`; chosen by a "
        "hash of the row's id. Null: one row in twenty, the same ones with every seed. 0: none, so that `grpo` has "
        "nothing to choose its best checkpoint by and keeps the last one.",
    )
    duplicates: DuplicatesSection | None = Field(
        default=None, description="Remove duplicates and rows of the benchmarks; needs `curate`. Null: keep all rows."
    )
    balance: BalanceSection | None = Field(
        default=None, description="Leave rows out to reach target shares; needs `curate`. Null: keep all rows."
    )
    categories: dict[str, str] = Field(
        default_factory=dict,
        description="Maps a source's category to one of the taxonomy (`sources.categories`), before the built-in map.",
    )

    @property
    def needs_curation(self) -> bool:
        """Whether the section asks for what only `curate` does: removing duplicates, or balancing."""
        return self.duplicates is not None or self.balance is not None
