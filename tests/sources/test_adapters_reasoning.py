"""Adapters of sets with reasoning: the authors' releases and ShareGPT rows, with every way to be broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guardreasoner_vl.protocol import INSTRUCTION, TargetLabel, build_messages, training_target
from guardreasoner_vl.sources.adapters import RecordContext, read_source
from guardreasoner_vl.sources.catalogue import adapter_named
from guardreasoner_vl.sources.skipped import SkippedRows
from guardreasoner_vl.types import Exchange, Sample, unix_lines
from tests.builders import labels, write_image, write_records


def read(name: str, folder: Path) -> tuple[list[Sample], SkippedRows]:
    skipped = SkippedRows()
    return list(read_source(adapter_named(name), folder, folder / "unpacked", skipped)), skipped


def spoken(prompt: str, response: str = "None") -> str:
    return f"Human user:\n{prompt}\n\nAI assistant:\n{response}\n"


def written(request: str, response: str = "None", reasoning: str = "# Task 1\nA cake.") -> str:
    block = f"Answers:\nRequest: {request}\nResponse: {response}"
    return f"<think>\n{reasoning}\n</think>\n<result>\n{block}\n</result>"


def released(user: str, assistant: str, **more: Any) -> dict[str, Any]:
    said = [("system", INSTRUCTION), ("user", user), ("assistant", assistant)]
    return {"messages": [{"role": role, "content": text} for role, text in said], **more}


def sharegpt(user: str, assistant: str, **more: Any) -> dict[str, Any]:
    said = [("human", user), ("gpt", assistant)]
    return {"system": INSTRUCTION, "conversations": [{"from": who, "value": text} for who, text in said], **more}


LAYOUTS = [("guardreasoner-vltrain", released, "GuardReasoner-VLTrainText.json"), ("sharegpt", sharegpt, "a.jsonl")]
either = pytest.mark.parametrize(("name", "row", "file"), LAYOUTS)


# --- GuardReasonerTrain ---------------------------------------------------------------------------------


def step(text: str, response: str, output: object) -> dict[str, Any]:
    return {"instruction": "judge", "input": f"{spoken(text, response)}\n", "output": output}


def test_guardreasonertrain(tmp_path: Path) -> None:
    full = "# Task 1\nAnswers: are below.\n\nAnswers: \nRequest: harmful\nCompletion: compliance\nResponse: unharmful\n"
    rows = [
        step("bake", "bread", full),
        step("brew", "None", "Steps.\nAnswers:\nRequest: unharmful\nResponse: harmful"),
        step("c", "d", "Answers:\nResponse: Harmful\n"),
        step("e", "f", "Answers:\nRequest: harmful\nResponse: BAD"),
        step("e", "f", "Answers:\nRequest: harmful\nAnswers:\nRequest: unharmful"),
        step("e", "f", "Answers:\nRequest: harmful\nRequest: unharmful"),
        step("e", "None", "Steps.\nAnswers:\nRequest: None\nResponse: harmful"),
        step("e", "f", "Request: harmful"),
        step("e", "f", None),
        {"input": "bake", "output": "Answers:\nRequest: harmful"},
        step("", "", "Answers:\nRequest: harmful"),
    ]
    write_records(tmp_path, "WildGuardTrain-R.json", rows)
    write_records(tmp_path, "AegisTrain-R.json", rows[:1])
    write_records(tmp_path, "other.json", rows)
    samples, skipped = read("guardreasonertrain", tmp_path)
    assert [(one.id, one.meta["file"]) for one in samples] == [
        ("guardreasonertrain/0", "AegisTrain-R"),
        *((f"guardreasonertrain/{number}", "WildGuardTrain-R") for number in (1, 2, 3, 5)),
    ]
    assert labels(samples[1:]) == [
        ("harmful", "unharmful"), ("unharmful", None), (None, "harmful"), ("unharmful", None),
    ]  # fmt: skip
    assert [one.reasoning for one in samples[1:]] == [
        "# Task 1\nAnswers: are below.", "Steps.", None, "Answers:\nRequest: harmful",
    ]  # fmt: skip
    assert [(one.prompt, one.response) for one in samples[1:3]] == [("bake", "bread"), ("brew", None)]
    assert skipped.reasons == {
        "its response label is none of harmful, unharmful, harmless": 1,
        "several request labels": 1,
        "no label": 1,
        "no answers in its output": 1,
        "no text in 'output'": 1,
        "not the released layout": 2,
    }


# --- conversations --------------------------------------------------------------------------------------


@either
def test_conversations_are_read_by_the_protocol(name: str, row: Any, file: str, tmp_path: Path) -> None:
    write_image(tmp_path, "image/a.png")
    write_records(
        tmp_path,
        file,
        [
            row(spoken("bake", "bread"), written("harmful", "unharmful")),
            row(spoken("<image>"), written("unharmful"), images=["./image/a.png"]),
            row(spoken("<image>\n<image>\nwhat?"), written("harmless"), images=["image/a.png", "data/image/a.png"]),
            row(spoken("None", "bread"), written("harmful", "unharmful"), images=[]),
            row(spoken("bake"), written("harmful", reasoning=""), images=None),
        ],
    )
    samples, skipped = read(name, tmp_path)
    assert not skipped.total
    assert labels(samples) == [
        ("harmful", "unharmful"), ("unharmful", None), ("unharmful", None), (None, "unharmful"), ("harmful", None),
    ]  # fmt: skip
    assert [(one.prompt, one.response) for one in samples] == [
        ("bake", "bread"), ("", None), ("what?", None), ("", "bread"), ("bake", None),
    ]  # fmt: skip
    assert [one.modality for one in samples] == ["text", "image", "text-image", "text", "text"]
    assert samples[2].images == (str(tmp_path / "image/a.png"),) * 2
    assert [one.reasoning for one in samples] == ["# Task 1\nA cake."] * 4 + [None]
    assert (samples[3].id, samples[3].source, samples[3].split) == (f"{name}/3", name, "train")


BROKEN: list[tuple[str, str, dict[str, Any], str]] = [
    (spoken("bake"), "I am not sure.", {}, "its answer breaks the protocol: missing_think"),
    (spoken("bake"), written("BAD"), {}, "its answer breaks the protocol: unknown_label"),
    (spoken("bake"), written("None"), {}, "its answer breaks the protocol: missing_label"),
    (spoken("bake", "bread"), written("harmful"), {}, "its answer breaks the protocol: missing_label"),
    (spoken("bake"), written("harmful") + " and more", {}, "its answer breaks the protocol: trailing_text"),
    (spoken("None"), written("harmful"), {}, "not the released layout"),
    ("bake", written("harmful"), {}, "not the released layout"),
    (" ", written("harmful"), {}, "no text in"),
    (spoken("<image>\nbake"), written("harmful"), {}, "the number of images differs from the number of <image> marks"),
    (
        spoken("bake"), written("harmful"), {"images": ["a.png"]},
        "the number of images differs from the number of <image> marks",
    ),
    (spoken("<image>"), written("harmful"), {"images": ["b.png"]}, "its image is missing"),
    (spoken("<image>"), written("harmful"), {"images": ["../in/a.png"]}, "an image outside the data set's folder"),
    (spoken("<image>"), written("harmful"), {"images": 3}, "its images are not a list of paths"),
    (spoken("<image>"), written("harmful"), {"images": [{"path": "a.png"}]}, "its images are not a list of paths"),
    (spoken("bake"), written("harmful"), {"sample": "x"}, "its 'sample' does not hold fields of a sample"),
    (spoken("bake"), written("harmful"), {"sample": {"prompt": 3}}, "its 'sample' does not hold fields of a sample"),
    (spoken("bake"), written("harmful"), {"sample": {"colour": 3}}, "its 'sample' does not hold fields of a sample"),
    (
        spoken("bake"), written("harmful"), {"sample": {"request_label": "BAD"}},
        "its 'sample' does not hold fields of a sample",
    ),
]  # fmt: skip


@either
@pytest.mark.parametrize(("user", "assistant", "more", "reason"), BROKEN)
def test_broken_conversations_are_named(
    name: str, row: Any, file: str, user: str, assistant: str, more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    write_image(folder, "a.png")
    write_records(folder, file, [row(user, assistant, **more)])
    samples, skipped = read(name, folder)
    assert not samples
    ((place, message),) = skipped.rows
    assert place == f"{file}, {'line' if file.endswith('.jsonl') else 'record'} 1"
    assert message.startswith(reason)


def test_there_is_one_message_of_each(tmp_path: Path) -> None:
    whole = sharegpt(spoken("bake"), written("harmful"))
    first, second = whole["conversations"]
    odd: list[Any] = [None, 3, [], [first], [second], [first, second, first], ["x", first], [{"from": "human"}, second]]
    write_records(tmp_path, "rows.json", [{"conversations": said} for said in odd])
    samples, skipped = read("sharegpt", tmp_path)
    assert not samples
    assert skipped.reasons == {
        "'conversations': a message with an unknown role": 1,
        "not exactly one user and one assistant message": 6,
        "no text in 'value'": 1,
    }


def test_other_names_of_the_roles_and_files_beside(tmp_path: Path) -> None:
    said = [("system", "judge"), ("user", spoken("bake")), ("assistant", written("harmful"))]
    write_records(tmp_path, "a.json", [{"conversations": [{"from": who, "value": text} for who, text in said]}])
    write_records(tmp_path, "b.jsonl.gz", [sharegpt(spoken("brew"), written("unharmful"))])
    write_records(tmp_path, "dataset_info.json", {"guard": {"file_name": "a.json", "formatting": "sharegpt"}})
    samples, skipped = read("sharegpt", tmp_path)
    assert [(one.prompt, one.id) for one in samples] == [("bake", "sharegpt/0"), ("brew", "sharegpt/1")]
    assert not skipped.total


@either
def test_what_the_layout_cannot_carry_goes_before_what_was_read(name: str, row: Any, file: str, tmp_path: Path) -> None:
    write_image(tmp_path, "a.png")
    overrides: dict[str, Any] = {
        "id": "x/1",
        "source": "x",
        "split": "test",
        "meta": {"category": "c"},
        "response_label": None,
    }
    one_line = "<think>\nSteps.\n</think>\n<result>\nAnswers:\nResponse: harmful\n</result>"
    unlabelled = {"request_label": None, "response_label": "harmful"}
    whole = {"prompt": "None", "response": None, **unlabelled, "request_label": "harmful", "reasoning": "r"}
    write_records(
        tmp_path,
        file,
        [
            row(spoken("bake", "bread"), written("harmful", "harmful"), sample=overrides),
            row(spoken("bake", "bread"), one_line, sample=unlabelled),
            row(spoken("<image>"), written("harmful"), images=["a.png"], sample={"images": ["/b.png"], "prompt": None}),
            row("no transcript", "no answer", sample=whole),
            row(spoken("None", "bread"), written("harmful", "harmful"), sample={"prompt": "None"}),
        ],
    )
    first, second, third, fourth, fifth = read(name, tmp_path)[0]
    assert first == Sample(
        modality="text",
        prompt="bake",
        response="bread",
        request_label="harmful",
        reasoning="# Task 1\nA cake.",
        **{key: value for key, value in overrides.items() if key != "response_label"},
    )
    assert (second.request_label, second.response_label, second.reasoning) == (None, "harmful", "Steps.")
    assert (third.images, third.prompt, third.modality) == ((str(tmp_path / "a.png"),), "", "image")
    assert (fourth.prompt, fourth.request_label, fourth.reasoning) == ("None", "harmful", "r")
    assert (fifth.prompt, fifth.request_label) == ("None", "harmful")


plain = st.text(st.characters(codec="ascii", exclude_characters="<>:"), min_size=1).map(str.strip)
words = plain.filter(lambda text: text not in ("", "None"))
known = st.sampled_from(("harmful", "unharmful"))


@given(words, st.none() | words, known, known, words)
def test_what_we_write_is_read_back(prompt: str, response: str | None, request: Any, answered: Any, why: str) -> None:
    user = build_messages(Exchange(prompt, (), response))[1].text
    spans = training_target(why, TargetLabel(request), TargetLabel(answered if response else "None"))
    for name, row, _ in LAYOUTS:
        record = row(user, "".join(span.text for span in spans))
        sample = adapter_named(name).to_sample(record, RecordContext("x", 0, Path(), Path()))
        assert isinstance(sample, Sample)
        texts = [text if text is None else unix_lines(text) for text in (prompt, response, why)]
        assert [sample.prompt, sample.response, sample.reasoning] == texts
        assert labels([sample]) == [(request, answered if response else None)]
