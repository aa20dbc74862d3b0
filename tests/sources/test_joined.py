"""Rows made of training rows: their labels follow from their parents', whatever stands around them."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.evaluation.perturbations import BENIGN, FORGED_RESULT, FORGED_TURN
from guardreasoner_vl.images.exchange import checked_exchange
from guardreasoner_vl.protocol import build_messages
from guardreasoner_vl.recipe import DataSection, JoinedSection
from guardreasoner_vl.sources.checked import checked_sample
from guardreasoner_vl.sources.joined import (
    ANSWERS,
    CLAIMS,
    FORGED,
    LONG,
    LONGEST,
    PAIR,
    PARENT,
    REPLIES,
    SENTENCES,
    SOURCE,
    VERDICTS,
    forged,
    joined_rows,
)
from guardreasoner_vl.sources.jsonl import is_held_out
from guardreasoner_vl.sources.mixture import Mixture, build_mixture, extended
from guardreasoner_vl.sources.synthetic.fillers import EVERYDAY, Fillers
from guardreasoner_vl.sources.union import class_of, union_label
from guardreasoner_vl.types import Sample

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.slow


def sample(number: int, **fields: Any) -> Sample:
    label = "harmful" if number % 2 else "unharmful"
    deed = "break the old fence" if number % 2 else "mend the old fence"
    source = "toy" if number % 2 else "calm"
    prompt = f"Tell me how to {deed} {number}"
    defaults = {"id": f"toy-{number}", "source": source, "modality": "text", "prompt": prompt, "request_label": label}
    return Sample.model_validate(defaults | fields)


def answered(number: int, **fields: Any) -> Sample:
    label = "harmful" if number % 2 else "unharmful"
    response = f"Take tool number {number} first. Then wait for an hour! Is that all?"
    return sample(number, **{"response": response, "response_label": label} | fields)


ROWS = [sample(number) for number in range(400)] + [answered(number) for number in range(400, 600)]
BY_ID = {row.id: row for row in ROWS}


def made(rows: list[Sample] = ROWS, seed: int = 0, **section: Any) -> list[Sample]:
    return joined_rows(rows, JoinedSection(**{"share": 0.5, **section}), seed)


def parents(row: Sample) -> list[Sample]:
    """Those rows that decide: of a pair both, else the first."""
    return [BY_ID[name] for name in row.provenance.of[: 2 if row.provenance.joined == PAIR else 1]]


# --- how many, and of which kind ------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.12, 0.5])
def test_they_are_a_share_of_all_texts_and_half_of_them_harmful(share: float) -> None:
    images = [sample(number, modality="image", prompt="", images=("a.png",)) for number in range(900, 990)]
    rows = made([*ROWS, *images], share=share)
    assert len(rows) / (len(rows) + len(ROWS)) == pytest.approx(share, abs=0.002)
    counts = Counter(class_of(row) for row in rows)
    assert set(counts) == {"harmful", "unharmful"}
    assert abs(counts["harmful"] - counts["unharmful"]) <= 1


def test_repeated_rows_count_as_often_as_they_are_taken() -> None:
    marked = [row.model_copy(update={"meta": {"repeat": 3}}) for row in ROWS]
    assert made(ROWS * 3) == made(marked)
    assert len(made(marked)) == 1800


def test_kinds() -> None:
    rows = made(share=0.9, long=0.05)
    counts = Counter(row.provenance.joined for row in rows)
    assert set(counts) == {SENTENCES, PAIR, FORGED, LONG}
    assert counts[LONG] / len(rows) == pytest.approx(0.05, abs=0.01)
    assert min(counts[PAIR], counts[FORGED]) / len(rows) > 0.2
    for kind in counts:
        labels = Counter(class_of(row) for row in rows if row.provenance.joined == kind)
        assert labels["harmful"] / labels.total() == pytest.approx(0.5, abs=0.06), kind


def test_the_same_seed_gives_the_same_rows() -> None:
    assert made(seed=1) == made(seed=1)
    assert made(seed=1) != made(seed=2)
    prompts = [row.prompt for row in made(seed=1)]
    assert prompts != [row.prompt for row in joined_rows(ROWS, JoinedSection(share=0.5, seed=1), 1)]


def test_each_row_has_an_id_of_its_own_that_is_not_held_out() -> None:
    rows = made(share=0.9)
    assert len({row.id for row in rows}) == len(rows)
    assert all(row.id.startswith("joined/") and not is_held_out(row.id) for row in rows)
    assert {(row.source, row.split, row.modality) for row in rows} == {(SOURCE, "train", "text")}


def test_every_parent_has_its_turn() -> None:
    used = Counter(row.provenance.of[0] for row in made() if row.provenance.joined != PAIR)
    assert len(used) > 300
    assert max(used.values()) <= 3


def test_a_class_that_is_lacking_is_left_out() -> None:
    harmful = [row for row in ROWS if class_of(row) == "harmful"]
    assert {class_of(row) for row in made(harmful)} == {"harmful"}
    assert len(made(harmful)) == len(harmful) // 2
    assert made([sample(0, request_label=None)]) == []
    assert made([]) == []


def test_weak_and_long_rows_are_not_joined() -> None:
    odd = [
        *(sample(number, meta={"weak": True}) for number in range(600, 640)),
        *(sample(number, prompt="x" * (PARENT + 1)) for number in range(640, 680)),
        *(sample(number, prompt=" ", response="Yes.", response_label="harmful") for number in range(680, 700)),
    ]
    names = {row.id for row in odd}
    rows = made([*ROWS, *odd], share=0.9)
    assert not names & {name for row in rows for name in row.provenance.of}


# --- labels ---------------------------------------------------------------------------------------------


def test_labels_follow_from_the_parents() -> None:
    rows = made(share=0.9)
    for row in rows:
        known = parents(row)
        assert row.request_label == union_label(known, "request")
        assert row.response_label == union_label(known, "response")
        assert row.request_label == ("harmful" if any(one.request_label == "harmful" for one in known) else "unharmful")
    pairs = Counter(tuple(class_of(one) for one in parents(row)) for row in rows if row.provenance.joined == PAIR)
    assert set(pairs) == {(one, other) for one in ("harmful", "unharmful") for other in ("harmful", "unharmful")}
    mixed = pairs["harmful", "unharmful"] + pairs["unharmful", "harmful"]
    assert mixed > pairs["harmful", "harmful"]
    assert 0.35 < pairs["harmful", "unharmful"] / mixed < 0.65


def test_what_nobody_labelled_stays_unlabelled() -> None:
    rows = [answered(number, request_label=None) for number in range(200)]
    for row in made(rows, share=0.8):
        assert row.provenance.joined in (SENTENCES, FORGED, LONG)
        assert row.request_label is None
        assert row.response_label is not None


def test_the_parents_texts_stand_in_the_row_as_they_are() -> None:
    for row in made(share=0.9):
        for parent in parents(row):
            assert parent.prompt in row.prompt
            assert (parent.response or "") in (row.response or "")


def test_what_the_label_rests_on_is_noted() -> None:
    rows = [row.model_copy(update={"meta": {"category": row.id, "other": 1}}) for row in ROWS]
    for row in made(rows, share=0.9):
        known = parents(row)
        harmful = [one for one in known if class_of(one) == "harmful"]
        if row.provenance.joined != PAIR:
            ((target, text),) = row.provenance.plain.items()
            assert text == (known[0].prompt if target == "request" else known[0].response)
        elif harmful:
            assert row.provenance.plain["request"] in {one.prompt for one in harmful}
            assert row.meta["category"] in {one.id for one in harmful}
        else:
            assert not {"plain", "category"} & set(row.meta)
        assert "other" not in row.meta


# --- harmless sentences ---------------------------------------------------------------------------------


def test_fillers_are_of_harmless_rows_alone() -> None:
    rows = [
        sample(0, prompt="Mend the fence"),
        sample(1, prompt="a harmful request"),
        sample(2, prompt="a weak one", meta={"weak": True}),
        sample(4, prompt="a remark", meta={"task": "toxicity"}),
        sample(6, prompt="asked", response="a harmful answer.", response_label="harmful"),
        sample(
            8,
            prompt="p\nq",
            response="Take the hammer now. <b>No.</b> 4 nails. (See p. 7.) A St. Done!",
            response_label="unharmful",
        ),
        sample(10, prompt="Wash it", response="Nobody has labelled this one."),
        sample(12, prompt="y" * 201),
        sample(14, prompt="", images=("a.png",), modality="image"),
        sample(16, prompt="unlabelled", request_label=None, response="Fine.", response_label="unharmful"),
        sample(18, prompt="of a source with both classes", source="toy"),
        *(sample(number, prompt="<>") for number in range(20, 80, 2)),
    ]
    assert Fillers.of(rows).sentences == [
        ("Mend the fence", "toy-0"),
        ("Take the hammer now.", "toy-8"),
        ("Done!", "toy-8"),
        ("Wash it", "toy-10"),
    ]


def test_sentences_stand_around_the_text() -> None:
    rows = [row for row in made(share=0.9) if row.provenance.joined == SENTENCES]
    places: Counter[tuple[bool, bool]] = Counter()
    targets: Counter[str] = Counter()
    harmless = {sentence for sentence, _ in Fillers.of(ROWS).sentences} | set(EVERYDAY)
    for row in rows:
        ((target, text),) = row.provenance.plain.items()
        targets[target] += 1
        whole = row.prompt if target == "request" else row.response
        assert whole is not None
        before, _, after = whole.partition(text)
        places[bool(before), bool(after)] += 1
        assert any(sentence in before + after for sentence in harmless)
    assert set(places) == {(True, False), (False, True), (True, True)}
    assert min(places.values()) > len(rows) / 8
    assert 0 < targets["response"] < targets["request"]


def test_fillers_are_counted_out() -> None:
    rng = random.Random(0)
    fillers = Fillers([(f"S{number}.", f"toy-{number}") for number in range(1000)])
    kinds: set[object] = set()
    for _ in range(200):
        drawn = fillers.drawn(5, rng)
        if drawn.rows:
            assert len(drawn.text.split()) == 5
            numbers = [int(name.partition("-")[2]) for name in drawn.rows]
            kinds.add(numbers == list(range(numbers[0], numbers[0] + 5)))
        else:
            assert any(sentence in drawn.text for sentence in EVERYDAY)
            kinds.add("everyday")
    assert kinds == {True, False, "everyday"}
    assert Fillers().drawn(3, rng).rows == ()


def test_long_rows_are_long() -> None:
    rows = made(share=0.5, long=1)
    assert {row.provenance.joined for row in rows} == {LONG}
    lengths = [len(row.prompt) + len(row.response or "") for row in rows]
    assert min(lengths) >= LONGEST[0]
    assert max(lengths) < LONGEST[1] + PARENT + 2000


def test_everyday_sentences_are_not_those_of_the_robustness_report() -> None:
    assert len(EVERYDAY) == len(set(EVERYDAY)) >= 80
    assert all(sentence.strip() == sentence and 8 <= len(sentence) <= 120 for sentence in EVERYDAY)
    assert not set(EVERYDAY) & set(BENIGN)


# --- forged verdicts ------------------------------------------------------------------------------------


def test_a_forged_verdict_changes_nothing() -> None:
    rows = [row for row in made(share=0.9) if row.provenance.joined == FORGED]
    claims: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for row in rows:
        (parent,) = parents(row)
        assert (row.request_label, row.response_label) == (parent.request_label, parent.response_label)
        forgery = row.prompt.replace(parent.prompt, "")
        said = "unharmful" if "unharmful" in forgery.lower() else "harmful" if "harmful" in forgery else "none"
        claims[class_of(row) == "harmful"][said] += 1
    for counts in claims.values():
        assert set(counts) == {"unharmful", "harmful", "none"}
    shares = [counts["unharmful"] / counts.total() for counts in claims.values()]
    assert shares[0] == pytest.approx(shares[1], abs=0.12)


def test_forgeries_are_not_those_of_the_robustness_report() -> None:
    rng = random.Random(0)
    verdicts = {forged(rng) for _ in range(3000)}
    assert len(verdicts) > 150
    assert not any(known.strip() in forgery for forgery in verdicts for known in (FORGED_TURN, FORGED_RESULT))
    assert not any(part in FORGED_TURN for part in (*ANSWERS, *REPLIES))
    assert any("<result>" in verdict for verdict in VERDICTS)
    assert {"harmful", "unharmful"} <= set(CLAIMS)


def test_markers_are_broken_where_a_guard_is_asked() -> None:
    for row in made(share=0.9):
        text = build_messages(row.exchange())[1].text
        assert "<result>" not in text
        assert "<|im_start|>" not in text
        assert text.count("\nAI assistant:") == 1
        assert text.count("Human user:\n") == text.count("\n| Human user:\n") + 1


# --- in a mixture ---------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in ROWS))
    return tmp_path / "data"


def mixture(root: Path, source: dict[str, Any] | None = None, **data: Any) -> Mixture:
    section = {"folder": "toy", "origin": "made up", "licence": "CC0", "test_share": 0.1, **(source or {})}
    read = DataSection.model_validate({"sources": [section], **data})
    return build_mixture(read, root, root.parent / "work", 0)


def test_rows_that_are_not_trained_on_stay_out_of_it(root: Path) -> None:
    plain, both = mixture(root), mixture(root, joined={"share": 0.5}, varied={"share": 0.5})
    assert (both.held_out, both.test) == (plain.held_out, plain.test)
    assert plain.held_out
    assert plain.test
    train = {row.id for row in plain.train}
    rows = [row for row in both.train if row.source == SOURCE]
    assert len(rows) == len(plain.train)
    assert {name for row in rows for name in row.provenance.of} <= train
    assert not any(is_held_out(row.id) for row in both.train)
    assert any(row.provenance.variation for row in rows)
    others = [row for row in both.train if row.source != SOURCE]
    assert [row.id.partition("+")[0] for row in others] == [row.id for row in plain.train]


def test_without_either_section_nothing_is_made(root: Path) -> None:
    rows = mixture(root).train
    assert extended(rows, DataSection(), root, 0) == rows
    assert not any({"joined", "variation"} & set(row.meta) for row in rows)


def test_ten_thousand_rows_take_a_moment() -> None:
    rows = [answered(number) for number in range(10_000)]
    start = time.perf_counter()
    joined_rows(rows, JoinedSection(), 0)
    assert time.perf_counter() - start < 6  # 100,000 rows take seconds; the machine may be busy


texts = st.text(min_size=1).filter(str.strip)


@settings(max_examples=60)
@given(prompts=st.lists(texts, min_size=2, max_size=4), response=texts, seed=st.integers(0, 99))
def test_any_texts_give_rows_that_intake_accepts(prompts: list[str], response: str, seed: int) -> None:
    rows = [
        sample(number, prompt=prompt, response=response if number % 3 == 0 else None, response_label="unharmful")
        for number, prompt in enumerate(prompts)
    ]
    for row in made(rows, seed=seed, share=0.7):
        checked_sample(row)
        assert Sample.model_validate(json.loads(row.model_dump_json())) == row
        exchange, _ = checked_exchange(row.exchange())
        assert exchange.has_prompt
        assert build_messages(exchange)
