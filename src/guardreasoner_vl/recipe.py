"""Typed recipes, read from YAML. Unknown keys are refused with the name of the nearest known one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from guardreasoner_vl.errors import RecipeError
from guardreasoner_vl.types import Modality

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SAMPLES = "samples"
"""The adapter for rows of our own."""

_TOKEN_PIXELS = 28 * 28  # what one image token covers


class Section(BaseModel):
    """Immutable part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TextShape(Section):
    """Decoder of a small Qwen2.5-VL."""

    hidden_size: int = 320
    intermediate_size: int = 896
    layers: int = 6
    heads: int = 5
    kv_heads: int = 5
    max_positions: int = 2048
    rope_theta: float = 10_000.0

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.heads % self.kv_heads or self.hidden_size % (2 * self.heads):
            raise ValueError("hidden_size must be a multiple of 2 x heads, and heads a multiple of kv_heads")
        return self


class VisionShape(Section):
    """Vision tower of a small Qwen2.5-VL; `full_attention` lists the layers without windows."""

    hidden_size: int = 192
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 6
    full_attention: tuple[int, ...] = (1, 3)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden_size % (4 * self.heads):
            raise ValueError("hidden_size must be a multiple of 4 x heads")
        if not all(0 <= layer < self.layers for layer in self.full_attention):
            raise ValueError(f"full_attention lists layers from 0 to {self.layers - 1}")
        return self


class NewModel(Section):
    """A Qwen2.5-VL to be made from nothing, its byte-level BPE learnt from the training texts."""

    vocab_size: int = Field(default=8192, ge=512)
    min_pixels: int = 56 * 56
    max_pixels: int = 224 * 224
    text: TextShape = TextShape()
    vision: VisionShape = VisionShape()

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        if not _TOKEN_PIXELS <= self.min_pixels <= self.max_pixels:
            raise ValueError(f"use {_TOKEN_PIXELS} <= min_pixels <= max_pixels")
        return self


class ReadingSection(Section):
    """Drawn pictures that the vision tower learns to read from before SFT (`stages.reading`)."""

    pictures: int = Field(ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1)


class ModelSection(Section):
    """Where training starts: a folder or hub id, or a new model; `reading` first teaches a small one to read."""

    path: str | None = None
    revision: str | None = None
    new: NewModel | None = None
    reading: ReadingSection | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.path is None) == (self.new is None):
            raise ValueError("give either `path` (a folder or hub id) or `new` (a model to be made)")
        return self


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
    only: dict[str, tuple[str, ...]] = {}
    share: float = Field(default=1.0, gt=0, le=1)
    limit: int | None = Field(default=None, ge=1)
    test_share: float = Field(default=0.0, ge=0, lt=1)
    weak_share: float = Field(default=0.5, ge=0, le=1)
    repeat: int = Field(default=1, ge=1)
    unlabelled: bool = False
    labels_from: str | None = None
    picture: str | None = None
    picture_text: str | None = None

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


class DrawnSection(Section):
    """Pictures that the project draws itself."""

    count: int = Field(ge=1)
    repeat: int = Field(default=1, ge=1)


class DuplicatesSection(Section):
    """What counts as the same content (`sources.duplicates`): the texts' Jaccard index, the pictures' differing bits.

    Rows near one of `against` (benchmarks by name, or files below `--data`) are dropped.
    """

    text: float = Field(default=0.8, gt=0, le=1)
    image: int = Field(default=4, ge=0, le=32)
    against: tuple[str, ...] = ()


class BalanceSection(Section):
    """Shares reached by leaving rows out: of harmful rows inside each modality, and of each modality."""

    harmful: float | None = Field(default=None, gt=0, lt=1)
    modalities: dict[Modality, float] = {}

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.modalities and not (
            all(share > 0 for share in self.modalities.values()) and abs(sum(self.modalities.values()) - 1) < 1e-6
        ):
            raise ValueError("modalities are shares of the corpus: positive, 1 together")
        return self


class DataSection(Section):
    """What is trained on; rows of other modalities than the named ones are left out.

    `categories` maps a source's own category to one of the taxonomy (`sources.categories`), beside the built-in map.
    """

    sources: tuple[SourceSection, ...] = ()
    drawn: DrawnSection | None = None
    modalities: tuple[Modality, ...] = ("text", "image", "text-image")
    duplicates: DuplicatesSection | None = None
    balance: BalanceSection | None = None
    categories: dict[str, str] = {}

    @property
    def needs_curation(self) -> bool:
        """Whether it asks for more than mixing."""
        return self.duplicates is not None or self.balance is not None


class SftSection(Section):
    """Reasoning SFT (paper, section 3.2). Lengths are tokens, prompt and completion together.

    `freeze_vision` leaves the vision tower as it is, so that a small one does not unlearn to read.
    `label_weight` multiplies the loss of the words harmful and unharmful, two of some sixty tokens of a
    completion; at 1 the loss is the paper's.
    `precision`: `bf16` is autocast over fp32 weights, `bf16-weights` holds the model in bf16 with fp32 copies
    in the optimizer (one device; faster on a CPU).
    """

    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(default=5e-5, gt=0)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    batch_size: int = Field(default=6, ge=1)
    gradient_accumulation: int = Field(default=8, ge=1)
    max_length: int = Field(default=2048, ge=32)
    without_reasoning: float = Field(default=0.0, ge=0, le=1)
    label_weight: float = Field(default=1.0, ge=1)
    freeze_vision: bool = False
    precision: Literal["bf16", "bf16-weights", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    save_steps: int = Field(default=500, ge=1)
    teacher: Literal["rules"] | None = None
    deepspeed: str | None = None

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.deepspeed and self.precision == "bf16-weights":
            raise ValueError("precision bf16-weights is for one device; use bf16 with deepspeed")
        return self


class Recipe(Section):
    """How one guard is made; one without a `model` makes a corpus."""

    name: str
    seed: int = 0
    model: ModelSection | None = None
    data: DataSection = DataSection()
    sft: SftSection = SftSection()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.model and self.model.new and self.sft.max_length > self.model.new.text.max_positions:
            raise ValueError("sft.max_length is more than model.new.text.max_positions; lower it or raise the other")
        return self

    @property
    def base(self) -> ModelSection:
        """Where training starts; raises `RecipeError` if the recipe does not say."""
        if self.model is None:
            raise RecipeError(f"recipe {self.name}: no model to train; give `model.path` or `model.new`")
        return self.model


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; raises `RecipeError` with one line that says what to change.

    `extends: OTHER.yaml` takes over what that recipe, found beside this one, says: mappings are merged key by
    key, anything else is replaced.
    """
    return parse_recipe(_content(Path(path)), str(path))


def _content(path: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read; give the path of a YAML recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a YAML mapping with the keys {', '.join(Recipe.model_fields)}")
    extended = content.pop("extends", None)
    if extended is None:
        return content
    other = path.parent / str(extended)
    if other in (path, *below):
        raise RecipeError(f"{path}: extends {extended}, which extends it; remove one of the two")
    return _merged(_content(other, (path, *below)), content)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return old | {
        key: _merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }


def parse_recipe(content: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe given as a mapping."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_problem(error.errors())}") from error


def _first_problem(problems: list[ErrorDetails]) -> str:
    """An unknown key before others: it may be the missing one, misspelt."""
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{place or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}"
    close = _nearest([str(part) for part in problem["loc"]])
    hint = f"; did you mean {close!r}?" if close else "; remove it"
    return f"unknown key {place!r}{hint}"


def _nearest(place: list[str]) -> str | None:
    """The known key closest to the unknown one: misplaced, misspelt, or both; with its full name if elsewhere."""
    known = _known_keys(Recipe)
    own = ".".join(part for part in place[:-1] if not part.isdigit())
    keys = {name: name for name, section in known if section == own}
    elsewhere = {name: f"{section}.{name}" if section else name for name, section in known if section != own}
    for names, likeness in ((elsewhere, 1.0), (keys, 0.6), (elsewhere, 0.6)):
        close = difflib.get_close_matches(place[-1], names, n=1, cutoff=likeness)
        if close:
            return names[close[0]]
    return None


def _known_keys(section: type[BaseModel], place: str = "") -> list[tuple[str, str]]:
    """Every key and the dotted name of the section that it stands in, outer ones last."""
    keys: list[tuple[str, str]] = []
    for name, field in section.model_fields.items():
        inner = f"{place}.{name}" if place else name
        for kind in _parts(field.annotation):
            if issubclass(kind, Section):
                keys += _known_keys(kind, inner)
    return keys + [(name, place) for name in section.model_fields]


def _parts(annotation: Any) -> list[type]:
    inner = getattr(annotation, "__args__", ())
    return [annotation] if isinstance(annotation, type) and not inner else [p for a in inner for p in _parts(a)]
