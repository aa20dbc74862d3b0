"""Two rows as one: labels, texts, images and the draw, by hand."""

from __future__ import annotations

import math
import random
from itertools import islice, product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.images.geometry import LAYOUTS
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.rl.concatenation import Pair, concatenated, drawn_pairs, joint_label
from guardreasoner_vl.sources.union import class_of, made_for
from tests.builders import sample

if TYPE_CHECKING:
    from pathlib import Path

    from guardreasoner_vl.types import GoldLabel, Sample, Target

H: GoldLabel = "harmful"
U: GoldLabel = "unharmful"


def pair(first: Sample, second: Sample) -> Pair:
    return Pair(first, second, "stacked")


def labelled(name: str, target: Target, label: GoldLabel | None, present: bool = True) -> Sample:
    """A row whose other part, where it has one, is unharmful."""
    if target == "request":
        return sample(name, prompt="cake?" if present else " ", request_label=label, response="Mix.", response_label=U)
    return sample(name, request_label=U, response="Mix." if present else None, response_label=label)


# --- labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["request", "response"])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (H, H, H),
        (H, U, H),
        (H, None, H),
        (U, H, H),
        (U, U, U),
        (U, None, None),
        (None, H, H),
        (None, U, None),
        (None, None, None),
    ],
)
def test_the_union_rule(
    target: Target, first: GoldLabel | None, second: GoldLabel | None, expected: GoldLabel | None
) -> None:
    row = concatenated(pair(labelled("a", target, first), labelled("b", target, second)))
    assert (row.request_label, row.response_label) == ((expected, U) if target == "request" else (U, expected))


@pytest.mark.parametrize("target", ["request", "response"])
@pytest.mark.parametrize("label", [H, U, None])
def test_what_is_not_there_has_no_say(target: Target, label: GoldLabel | None) -> None:
    present, absent = labelled("a", target, label), labelled("b", target, None, present=False)
    assert joint_label(pair(present, absent), target) == joint_label(pair(absent, present), target) == label
    # A label of what is not there is a fault of the row, and not evidence.
    wrong = labelled("c", target, H, present=False)
    assert joint_label(pair(present, wrong), target) == label
    assert joint_label(pair(absent, wrong), target) is None


def test_an_image_alone_is_a_request() -> None:
    image = sample("a", modality="image", prompt="", images=("a.png",), request_label=None)
    assert joint_label(pair(image, sample("b", request_label=U)), "request") is None
    assert joint_label(pair(image, sample("b", request_label=H)), "request") == H


part = st.tuples(st.booleans(), st.sampled_from([H, U, None]))
rows = st.builds(
    lambda request, response: sample(
        "x",
        prompt="cake" if request[0] else "",
        request_label=request[1],
        response="Mix." if response[0] else None,
        response_label=response[1],
    ),
    part,
    part,
)


@given(first=rows, second=rows)
def test_harmful_exactly_where_a_parent_is_known_to_be(first: Sample, second: Sample) -> None:
    joined_row, reversed_row = concatenated(pair(first, second)), concatenated(pair(second, first))
    combinations = [
        (bool(first.prompt), first.request_label, bool(second.prompt), second.request_label, joined_row.request_label),
        (
            bool(first.response),
            first.response_label,
            bool(second.response),
            second.response_label,
            joined_row.response_label,
        ),
    ]
    for first_present, label, second_present, other_label, joint in combinations:
        known = {word for present, word in ((first_present, label), (second_present, other_label)) if present}
        assert (joint == H) == (H in known)
        assert (joint == U) == (known == {U})
    assert (joined_row.request_label, joined_row.response_label) == (
        reversed_row.request_label,
        reversed_row.response_label,
    )
    assert (class_of(joined_row) == H) == (H in (class_of(first), class_of(second)))


def test_the_class_of_a_row() -> None:
    assert class_of(sample("a", request_label=U, response="Mix.", response_label=H)) == H
    assert class_of(sample("a", response="Mix.", response_label=U)) == U
    assert class_of(sample("a")) is None
    assert class_of(sample("a", response_label=H)) is None


# --- texts and images ---------------------------------------------------------------------------------


def test_texts_stand_in_one_context() -> None:
    first = sample("a", prompt="bread?\n", response="Knead.", reasoning="it is bread", split="validation")
    first = first.model_copy(update={"request_label": U, "response_label": H})
    row = concatenated(pair(first, sample("b", prompt="cake?", response="Mix.", meta={"repeat": 3})))
    assert (row.prompt, row.response) == ("bread?\n\n\ncake?", "Knead.\n\nMix.")
    assert (row.source, row.split, row.modality, row.reasoning) == ("augmented", "train", "text", None)
    assert row.meta == {
        "parents": [
            {"id": "a", "modality": "text", "request_label": U, "response_label": H},
            {"id": "b", "modality": "text", "request_label": None, "response_label": None},
        ]
    }


@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_whitespace_is_no_text(blank: str | None) -> None:
    first = sample("a", prompt=blank or "", response="Knead.")
    row = concatenated(pair(first, sample("b", prompt="cake?", response=blank)))
    assert (row.prompt, row.response) == ("cake?", "Knead.")
    assert concatenated(pair(sample("a", response=blank), sample("b"))).response is None


def test_ids_are_made_of_both_in_order() -> None:
    a, b = sample("a"), sample("b")
    assert concatenated(pair(a, b)).id == "aug/3554d2b8a1e34099053865de"  # SHA-256 of ["a", "b"]
    names = {
        concatenated(pair(*ids)).id for ids in ((a, b), (b, a), (sample('a", "b'), sample("c")), (a, sample('b", "c')))
    }
    assert len(names) == 4


KINDS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "cake?", "response": "Mix."},
    "image": {"modality": "image", "prompt": ""},
    "text-image": {"modality": "text-image", "prompt": "what is it?"},
}


@pytest.mark.parametrize(("first", "second"), list(product(KINDS, KINDS)))
def test_every_kind_of_pair_can_be_asked_about(first: str, second: str, tmp_path: Path) -> None:
    parents = []
    for name, kind in (("a", first), ("b", second)):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (30, 20)).save(path)
        parents.append(sample(name, **KINDS[kind], images=() if kind == "text" else (str(path),)))
    Image.new("RGB", (60, 20)).save(tmp_path / "merged.png")
    parents_pair = Pair(parents[0], parents[1], "side_by_side")
    row = concatenated(parents_pair, str(tmp_path / "merged.png") if parents_pair.merges else None)
    exchange, images = checked_exchange(row.exchange())
    kinds = {first, second}
    assert len(row.images) == (kinds != {"text"})
    asked = {"text": "cake?", "text-image": "what is it?"}
    lines = ["<image>"] * len(row.images) + ["\n\n".join(asked[kind] for kind in (first, second) if kind in asked)]
    answer = "\n\n".join(["Mix."] * (first, second).count("text")) or "None"
    expected = "Human user:\n" + "\n".join(filter(None, lines)) + f"\n\nAI assistant:\n{answer}\n"
    assert build_messages(exchange)[1].text == expected
    assert row.modality == (kinds.pop() if len(kinds) == 1 else "text-image")
    assert [view.width for view in images] == ([60] if parents_pair.merges else [30] * len(row.images))
    assert row.meta.get("layout") == ("side_by_side" if parents_pair.merges else None)


def test_one_parents_images_stay_in_order() -> None:
    joined_pair = pair(sample("a", images=("1.png", "2.png")), sample("b"))
    assert concatenated(joined_pair).images == ("1.png", "2.png")
    with pytest.raises(ValueError, match="if both rows of the pair have images"):
        concatenated(joined_pair, "merged.png")
    with pytest.raises(ValueError, match="if both rows of the pair have images"):
        concatenated(pair(sample("a", images=("1.png",)), sample("b", images=("2.png",))))


# --- the draw -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hard", "share", "pairs"),
    [(80, 0.2, 20), (9_830, 0.2, 2_458), (10, 0.5, 10), (10, 0.9, 90), (5, 0.0, 0), (1, 0.2, 0), (0, 0.2, 0)],
)
def test_pairs_make_the_share(hard: int, share: float, pairs: int) -> None:
    assert made_for(hard, share) == pairs


def some(count: int, harmful: int = 0) -> list[Sample]:
    """Rows of which every other one of the first `2 * harmful` is harmful."""
    return [sample(f"s{at}", request_label=H if at % 2 == 0 and at < 2 * harmful else U) for at in range(count)]


def names(pairs: list[Pair]) -> list[frozenset[str]]:
    return [frozenset((one.first.id, one.second.id)) for one in pairs]


@given(count=st.integers(0, 12), seed=st.integers(0, 99))
def test_every_pair_once_and_none_with_itself(count: int, seed: int) -> None:
    drawn = names(list(drawn_pairs(some(count), random.Random(seed))))
    assert len(drawn) == len(set(drawn)) == math.comb(count, 2)
    assert all(len(ids) == 2 for ids in drawn)


@given(count=st.integers(0, 10), harmful=st.integers(0, 5), seed=st.integers(0, 99))
def test_outcomes_are_drawn_apart_and_completely(count: int, harmful: int, seed: int) -> None:
    rows = some(count, harmful)
    bad = {row.id for row in rows if class_of(row) == H}
    with_harm = names(list(drawn_pairs(rows, random.Random(seed), H)))
    without = names(list(drawn_pairs(rows, random.Random(seed), U)))
    assert all(ids & bad for ids in with_harm)
    assert not any(ids & bad for ids in without)
    assert len({*with_harm, *without}) == len(with_harm) + len(without) == math.comb(count, 2)


def test_the_draw_is_even() -> None:
    rows = some(4)
    first = [names(list(islice(drawn_pairs(rows, random.Random(seed)), 1)))[0] for seed in range(1200)]
    counts = [first.count(ids) for ids in set(first)]
    assert len(counts) == 6
    assert all(150 < count < 250 for count in counts)  # 200 each, 13 the standard deviation
    drawn = [next(drawn_pairs(rows, random.Random(seed))) for seed in range(400)]
    assert 150 < sum(one.first.id < one.second.id for one in drawn) < 250
    assert {one.layout for one in drawn} == set(LAYOUTS)


def test_the_seed_decides() -> None:
    rows = some(40)
    drawn, again, other = (list(islice(drawn_pairs(rows, random.Random(seed)), 30)) for seed in ("a", "a", "b"))
    assert drawn == again != other


def test_a_large_set_is_drawn_from_without_listing_its_pairs() -> None:
    rows = some(12_000)
    drawn = names(list(islice(drawn_pairs(rows, random.Random(0)), 3000)))
    assert len(set(drawn)) == 3000


def test_rows_with_one_id_are_one_row() -> None:
    assert names(list(drawn_pairs([sample("a"), sample("b"), sample("a")], random.Random(0)))) == [frozenset("ab")]
