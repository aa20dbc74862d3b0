"""One labelled row of a corpus, for training and evaluation, and what this package knows of its origin."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator

from guardreasoner_vl.choices import Target
from guardreasoner_vl.types.exchange import Exchange, UnixLines
from guardreasoner_vl.types.verdict import Frozen

if TYPE_CHECKING:
    from collections.abc import Mapping

Modality = Literal["text", "image", "text-image"]
"""What a request consists of."""

GoldLabel = Literal["harmful", "unharmful"]
"""A known label of a row."""


class Parent(Frozen):
    """What an augmented row records of one of the two rows in it."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(description="Id of the row.")
    modality: Modality = Field(description="Modality of the row.")
    request_label: GoldLabel | None = Field(description="Label of its request; null if not labelled.")
    response_label: GoldLabel | None = Field(description="Label of its response; null if not labelled.")


class Provenance(Frozen):
    """The keys of a row's `meta` that this package knows: where labels and texts come from, and how the row was made.

    A view: `meta` itself stays as the source wrote it, with any further keys. Numbers in text fields are read as text.
    """

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    weak: bool = Field(default=False, description="Whether the source's labels are doubtful.")
    labelled_by: str | None = Field(default=None, description="Data set that missing labels were taken from.")
    category: str | None = Field(default=None, description="Kind of harm, or subject, in the source's words.")
    category_of: Target | None = Field(
        default=None, description="What `category` is about; null: the labelled part, the request first."
    )
    taxonomy: str | None = Field(default=None, description="Category of this package that `category` belongs to.")
    task: str | None = Field(default=None, description="What the labels judge if not harm: `toxicity`.")
    kind: str | None = Field(default=None, description="Why a row may look harmful and is not, such as `homonyms`.")
    image_kind: str | None = Field(default=None, description="What the images show, in a few words.")
    image_text: str | None = Field(default=None, description="Words in the images; empty if there are none.")
    repeat: int = Field(default=1, ge=0, description="How often training uses the row.")
    joined: str | None = Field(default=None, description="Kind of a joined row, such as `pair`.")
    of: tuple[str, ...] = Field(default=(), description="Ids of the rows in a joined or rendered row.")
    variation: str | None = Field(default=None, description="How the text was changed, such as `leetspeak`.")
    plain: dict[Target, str] = Field(
        default_factory=dict, description="Texts that the labels of a joined or varied row rest on, by target."
    )
    parents: tuple[Parent, ...] = Field(default=(), description="The two rows in an augmented row.")
    layout: str | None = Field(default=None, description="How the images of an augmented row were merged.")
    teacher: str | None = Field(default=None, description="Who wrote the reasoning.")
    votes: dict[Target, int] = Field(
        default_factory=dict, description="How many of the teacher's answers agree with a label it gave, by target."
    )
    judged: dict[Target, GoldLabel] = Field(
        default_factory=dict, description="Label that the reasoning gives to a part without a label, by target."
    )

    @classmethod
    def of_meta(cls, meta: Mapping[str, Any]) -> Self:
        """Read `meta`; a null is a missing key. Raises `pydantic.ValidationError` for a value of a wrong type."""
        return cls.model_validate({name: value for name, value in meta.items() if value is not None})

    def as_meta(self) -> dict[str, Any]:
        """The entries of `meta`, without fields that have their default."""
        return self.model_dump(mode="json", exclude_defaults=True)


class Sample(Frozen):
    """One labelled row of a corpus. A null label means *not labelled*; `images` are readable file paths.

    Line ends are `\\n`, as in the exchange that is judged.
    """

    id: str = Field(description="Unique id of the row.")
    source: str = Field(description="Name of the data set.")
    split: str = Field(default="train", description="`train`, `validation` or `test`.")
    modality: Modality = Field(description="Text, image or both.")
    prompt: UnixLines = Field(default="", description="What the user wrote.")
    images: tuple[str, ...] = Field(default=(), description="Paths of the images.")
    response: UnixLines | None = Field(default=None, description="What the model answered; null if nothing.")
    request_label: GoldLabel | None = Field(default=None, description="Label of the request; null if not labelled.")
    response_label: GoldLabel | None = Field(default=None, description="Label of the response; null if not labelled.")
    reasoning: UnixLines | None = Field(default=None, description="The teacher's reasoning; null if none.")
    meta: dict[str, Any] = Field(
        default_factory=dict, description="What else is known of the row; the fields of `Provenance` have a fixed type."
    )

    @field_validator("meta")
    @classmethod
    def _typed(cls, meta: dict[str, Any]) -> dict[str, Any]:
        Provenance.of_meta(meta)
        return meta

    @property
    def provenance(self) -> Provenance:
        """The entries of `meta` that this package knows, typed."""
        return Provenance.of_meta(self.meta)

    def with_provenance(self, known: Provenance) -> Self:
        """The row with the fields of `known` that differ from their default added to `meta`; others stay."""
        return self.model_copy(update={"meta": {**self.meta, **known.as_meta()}})

    @property
    def has_request(self) -> bool:
        """Whether the request has text (not whitespace alone) or images."""
        return bool(self.prompt.strip() or self.images)

    @property
    def has_response(self) -> bool:
        """Whether the response has text (not whitespace alone)."""
        return bool(self.response and self.response.strip())

    def exchange(self) -> Exchange:
        """The row as an exchange. Raises `InputError` if it has no text and no image."""
        return Exchange(self.prompt or None, tuple(Path(path) for path in self.images), self.response)
