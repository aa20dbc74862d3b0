"""Benchmarks in their published layouts: made-up, mild records, every trap of the real ones."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from guardreasoner_vl.errors import DataError, InputError
from guardreasoner_vl.evaluation.benchmarks.base import LoadedBenchmark, load
from guardreasoner_vl.evaluation.benchmarks.catalogue import BENCHMARKS, MORE, PAPER, benchmark_named
from guardreasoner_vl.evaluation.published import sizes
from guardreasoner_vl.sources.records import read_records
from tests.builders import labels, write_image, write_records

if TYPE_CHECKING:
    from pathlib import Path


def get(name: str, folder: Path) -> LoadedBenchmark:
    return load(benchmark_named(name), folder, folder / "unpacked")


# --- the catalogue --------------------------------------------------------------------------------------


def test_the_fourteen_of_the_paper_have_their_sizes_and_origins() -> None:
    assert set(PAPER) == {size.file for size in sizes()}
    for size in sizes():
        entry = PAPER[size.file]
        assert (entry.size, entry.modality) == (size.samples, size.modality)
        assert entry.judged in (size.task, "both")
    assert PAPER["SPA_VL_Eval"].judged == "both"
    for entry in BENCHMARKS.values():
        assert entry.licence, entry.name
        assert entry.origin, entry.name
    assert len(BENCHMARKS) == len(PAPER) + len(MORE)


def test_names_match_in_any_case_and_unknown_ones_are_reported() -> None:
    assert benchmark_named("toxicchat").name == "ToxicChat"
    with pytest.raises(InputError, match=r"no benchmark named 'ToxicChad'.*ToxicChat"):
        benchmark_named("ToxicChad")


# --- the released test set ------------------------------------------------------------------------------


def row(prompt: str, response: str, output: str) -> dict[str, str]:
    return {
        "instruction": "judge",
        "input": f"Human user:\n{prompt}\n\nAI assistant:\n{response}\n\n",
        "output": output,
    }


def test_released_texts(tmp_path: Path) -> None:
    write_records(tmp_path, "test/ToxicChat.json", [row("bake", "None", "unharmful"), row("brew", "None", "Harmful")])
    loaded = get("ToxicChat", tmp_path)
    assert labels(loaded.samples) == [("unharmful", None), ("harmful", None)]
    assert [(sample.prompt, sample.response, sample.id) for sample in loaded.samples] == [
        ("bake", None, "ToxicChat/0"),
        ("brew", None, "ToxicChat/1"),
    ]
    assert loaded.size_differs == "ToxicChat: 2 rows, but the official set has 2,853"


def test_released_responses_and_missing_labels(tmp_path: Path) -> None:
    rows = [
        row("a", "b", "Answers: \nRequest: harmful\nResponse: harmful"),
        row("a", "b\n\nAI assistant:\nc", "Response: unharmful"),
        row("a", "b", "Answers:\nRequest: harmful\nResponse: None"),
        row("a", "b", ""),
        row("a", "b", "Response: dangerous"),
        row("a", "b", "Response: harmful\nResponse: unharmful"),
        {"input": "no layout", "output": "harmful"},
        {"output": "harmful"},
    ]
    write_records(tmp_path, "test/BeaverTails.json", rows)
    loaded = get("BeaverTails", tmp_path)
    assert labels(loaded.samples) == [(None, "harmful"), (None, "unharmful")]
    assert loaded.samples[1].response == "b\n\nAI assistant:\nc"
    assert loaded.skipped.reasons == {
        "no label": 2,
        "its response label is none of harmful, unharmful, harmless": 1,
        "several response labels": 1,
        "not the released layout": 1,
        "no text in 'input'": 1,
    }


def test_released_images(tmp_path: Path) -> None:
    write_image(tmp_path, "test/SPA_VL_Eval/0000.jpg")
    asked = "judge this\n\nHuman user:\n<image>\nwhat is it?\n\nAI assistant:\na cat\n"
    gold = "Answers:\nRequest: unharmful\nResponse: harmful"
    record = {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": gold}],
        "images": ["./SPA_VL_Eval/0000.jpg"],
    }
    write_records(tmp_path, "test/SPA_VL_Eval.json", [record, {**record, "images": ["./SPA_VL_Eval/0001.jpg"]}])
    loaded = get("spa_vl_eval", tmp_path)
    assert labels(loaded.samples) == [("unharmful", "harmful")]
    assert loaded.samples[0].prompt == "what is it?"
    assert loaded.samples[0].images == (str(tmp_path / "test/SPA_VL_Eval/0000.jpg"),)
    assert loaded.skipped.reasons == {"its image is missing": 1}


# --- upstream sets --------------------------------------------------------------------------------------


def test_toxic_chat(tmp_path: Path) -> None:
    rows = [
        {"user_input": "a", "human_annotation": "True", "toxicity": "1", "jailbreaking": "0"},
        {"user_input": "b", "human_annotation": "True", "toxicity": "0", "jailbreaking": "1"},
        {"user_input": "c", "human_annotation": "False", "toxicity": "1", "jailbreaking": "0"},
        {"user_input": "d", "human_annotation": "True", "toxicity": "yes", "jailbreaking": "0"},
    ]
    write_records(tmp_path, "toxic-chat/data/0124/toxic-chat_annotation_test.csv", rows)
    loaded = get("ToxicChat", tmp_path)  # in a folder of the given one
    assert labels(loaded.samples) == [("harmful", None), ("unharmful", None)]
    assert loaded.skipped.total == 1


def test_harmbench(tmp_path: Path) -> None:
    kinds = ("standard", "contextual", "copyright")
    rows = [
        {"Behavior": kind, "BehaviorID": kind, "FunctionalCategory": kind, "SemanticCategory": "x"} for kind in kinds
    ]
    write_records(tmp_path, "data/behavior_datasets/harmbench_behaviors_text_test.csv", rows)
    loaded = get("HarmBenchPrompt", tmp_path)
    assert [sample.prompt for sample in loaded.samples] == ["standard", "copyright"]
    assert labels(loaded.samples) == [("harmful", None)] * 2

    votes = {
        "one": [{"test_case": "a", "generation": "b", "human_0": 1, "human_1": 0, "human_2": 1}],
        "two": [
            {"test_case": "a", "generation": "b", "human_0": 1, "human_1": 0, "human_2": 0},
            {"test_case": "a", "generation": "b", "human_0": None, "human_1": 0, "human_2": 0},
        ],
    }
    write_records(tmp_path, "data/classifier_val_sets/text_behaviors_val_set.json", votes)
    loaded = get("HarmBenchResponse", tmp_path)
    assert labels(loaded.samples) == [(None, "harmful"), (None, "unharmful")]
    assert loaded.skipped.total == 1


def test_openai_moderation(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "S": 0, "H": 1}, {"prompt": "b", "S": 0}, {"prompt": "c"}, {"prompt": "d", "V": None}]
    write_records(tmp_path, "data/samples-1680.jsonl.gz", rows)
    loaded = get("OpenAIModeration", tmp_path)
    assert labels(loaded.samples) == [("harmful", None), *[("unharmful", None)] * 3]
    assert loaded.samples[0].meta == {"category": "H"}


def test_aegis(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    base = {"text": " a ", "text_type": "user_message", "labels_3": None}
    rows = [
        {**base, "labels_0": "Safe", "labels_1": "Safe", "labels_2": "Violence, Hate"},
        {**base, "labels_0": "Safe", "labels_1": "Needs Caution", "labels_2": "Violence"},
        {**base, "text_type": "multi_turn", "labels_0": "Safe", "labels_1": "Safe", "labels_2": "Safe"},
        {**base, "labels_0": "Safe", "labels_1": None, "labels_2": None},
    ]
    write_records(tmp_path, "Content Moderation Extracted Annotations 02.08.24_test_release_0418_v1.parquet", rows)
    loaded = get("AegisSafetyTest", tmp_path)
    assert labels(loaded.samples) == [("unharmful", None), ("harmful", None)]
    assert loaded.samples[0].prompt == "a"
    assert loaded.skipped.reasons == {"fewer than three annotations": 1}


def test_wildguard_leaves_rows_without_agreement_out(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "a",
            "response": "b",
            "prompt_harm_label": "harmful",
            "response_harm_label": None,
            "subcategory": "x",
        },
        {
            "prompt": "c",
            "response": None,
            "prompt_harm_label": None,
            "response_harm_label": "unharmful",
            "subcategory": "",
        },
        {
            "prompt": "e",
            "response": "f",
            "prompt_harm_label": "unharmful",
            "response_harm_label": "harmful",
            "subcategory": "",
        },
    ]
    write_records(tmp_path, "test/wildguard_test.parquet", rows)
    assert labels(get("WildGuardTestPrompt", tmp_path).samples) == [("harmful", None), ("unharmful", None)]
    loaded = get("WildGuardTestResponse", tmp_path)
    assert labels(loaded.samples) == [(None, "harmful")]
    assert loaded.skipped.reasons == {"no text in 'response'": 1}


@pytest.mark.slow
def test_safe_rlhf_draws_the_same_prompts_safe_and_unsafe(tmp_path: Path) -> None:
    def pair(number: int, flags: tuple[bool, bool]) -> dict[str, Any]:
        answers = {f"response_{k}": f"{'safe' if flags[k] else 'unsafe'} {number}" for k in range(2)}
        return {"prompt": f"p{number}", **answers, **{f"is_response_{k}_safe": flags[k] for k in range(2)}}

    rows = [pair(number, ((True, False), (False, True), (True, True))[number % 3]) for number in range(1800)]
    write_records(tmp_path, "round0/test.jsonl.xz", rows)
    samples = get("SafeRLHF", tmp_path).samples
    assert len(samples) == 2000
    assert [sample.response_label for sample in samples] == ["unharmful"] * 1000 + ["harmful"] * 1000
    assert [sample.prompt for sample in samples[:1000]] == [sample.prompt for sample in samples[1000:]]
    assert all(str(sample.response).startswith("safe" if n < 1000 else "unsafe") for n, sample in enumerate(samples))
    assert len({sample.id for sample in samples}) == 2000
    assert samples == get("SafeRLHF", tmp_path).samples


def test_beavertails_and_simple_safety_tests(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "response": "b", "category": {"x": False, "y": True}, "is_safe": False},
        {"prompt": "a", "response": "c", "category": {"x": False, "y": False}, "is_safe": True},
        {"prompt": "a", "response": "d", "category": {}, "is_safe": None},
    ]
    write_records(tmp_path, "round0/30k/test.jsonl.gz", rows)
    loaded = get("BeaverTails", tmp_path)
    assert labels(loaded.samples) == [(None, "harmful"), (None, "unharmful")]
    assert loaded.samples[0].meta == {"category": "y"}
    assert loaded.skipped.total == 1
    write_records(tmp_path, "sst_test_cases.csv", [{"id": "1", "harm_area": "x", "category": "y", "prompt": "a"}])
    assert labels(get("SimpleSafetyTests", tmp_path).samples) == [("harmful", None)]


def test_xstest(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "prompt": "kill a process", "type": "homonyms", "label": "safe"},
        {"id": "2", "prompt": "x", "type": "contrast_safe_targets", "label": "unsafe"},
        {"id": "3", "prompt": "y", "type": "safe_targets", "label": "unsafe"},
    ]
    write_records(tmp_path, "xstest_prompts.csv", rows)
    loaded = get("XSTest", tmp_path)
    assert labels(loaded.samples) == [("unharmful", None), ("harmful", None)]
    assert loaded.skipped.reasons == {"label and type disagree": 1}
    older = tmp_path / "older"
    write_records(older, "xstest_v2_prompts.csv", [{"id_v2": "v2-1", "type": "contrast_homonyms", "prompt": "a"}])
    assert labels(get("XSTest", older).samples) == [("harmful", None)]


# --- image sets ---------------------------------------------------------------------------------------


def test_image_sets(tmp_path: Path) -> None:
    moss = {"1": {"image": "images/1.png", "question": "q", "pid": "1", "metadata": {"over": "type 1"}}}
    write_records(tmp_path, "data/images_information/information.json", moss)
    write_image(tmp_path, "data/images/1.png")
    assert labels(get("MOSSBench", tmp_path).samples) == [("unharmful", None)]

    harm = [{"Behavior": "b", "BehaviorID": "i", "SemanticCategory": "s", "ImageFileName": "one.jpg"}]
    write_records(tmp_path, "data/behavior_datasets/harmbench_behaviors_multimodal_all.csv", harm)
    write_image(tmp_path, "data/multimodal_behavior_images/one.png")  # another ending than the name's
    assert get("HarmBenchMultimodal", tmp_path).samples[0].images[0].endswith("one.png")

    step = [{"dataset": "ForbidQI", "category_id": "1", "task_id": "2", "category_name": "c", "question": "no"}]
    write_records(tmp_path, "data/question/safebench.csv", step)
    write_image(tmp_path, "data/images/SafeBench/query_ForbidQI_1_2_6.png")
    loaded = get("FigStep", tmp_path).samples
    assert labels(loaded) == [("harmful", None)]
    assert "no" not in loaded[0].prompt.split()

    questions = {"0": {"Rephrased Question": "typed", "Rephrased Question(SD)": "drawn"}, "10": {}}
    write_records(tmp_path, "data/processed_questions/06-Fraud.json", questions)
    for variant in ("SD", "SD_TYPO", "TYPO"):
        write_image(tmp_path, f"data/imgs/06-Fraud/{variant}/0.jpg")
    prompts = {
        variant: get(f"MM-SafetyBench-{variant}-06-Fraud", tmp_path).samples[0].prompt for variant in ("SD", "TYPO")
    }
    assert prompts == {"SD": "drawn", "TYPO": "typed"}


def test_unsafebench_keeps_its_images_inside_the_files(tmp_path: Path) -> None:
    buffer = BytesIO()
    Image.new("RGB", (28, 28), "red").save(buffer, "PNG")
    seen = {"bytes": buffer.getvalue(), "path": None}
    first = {"image": seen, "safety_label": "Safe", "category": "Hate", "source": "Lexica", "text": "a red square"}
    write_records(tmp_path, "data/test-00000-of-00002.parquet", [first, {**first, "safety_label": "unsafe"}])
    write_records(
        tmp_path, "data/test-00001-of-00002.parquet", [{**first, "safety_label": "Unsafe"}, {**first, "image": None}]
    )
    write_records(tmp_path, "data/train-00000-of-00001.parquet", [first])
    loaded = get("UnsafeBench", tmp_path)
    assert labels(loaded.samples) == [("unharmful", None), ("harmful", None)]
    assert [sample.id for sample in loaded.samples] == ["UnsafeBench/0", "UnsafeBench/2"]
    assert loaded.skipped.reasons == {"'safety_label' is none of 'Safe', 'Unsafe'": 1, "no image in it": 1}
    assert loaded.size_differs == "UnsafeBench: 2 rows, but the official set has 2,037"
    sample = loaded.samples[0]
    assert (sample.modality, sample.prompt, sample.meta) == ("image", "", {"category": "Hate"})
    (unpacked,) = (tmp_path / "unpacked").iterdir()  # the same image is written once
    assert sample.images == loaded.samples[1].images == (str(unpacked),)
    assert unpacked.suffix == ".png"
    assert unpacked.read_bytes() == seen["bytes"]


def test_vlguard_has_two_rows_for_a_safe_image(tmp_path: Path) -> None:
    write_image(tmp_path, "test/a/1.png")
    rows = [
        {
            "id": "1",
            "image": "a/1.png",
            "safe": True,
            "instr-resp": [{"unsafe_instruction": "u"}, {"safe_instruction": "s"}],
        },
        {"id": "2", "image": "a/1.png", "safe": False, "harmful_category": "c", "instr-resp": [{"instruction": "i"}]},
        {"id": "3", "image": "a/1.png", "safe": "no", "instr-resp": [{"instruction": "i"}]},
    ]
    write_records(tmp_path, "test.json", rows)
    loaded = get("VLGuard", tmp_path)
    assert [(sample.prompt, sample.request_label) for sample in loaded.samples] == [
        ("u", "harmful"),
        ("s", "unharmful"),
        ("i", "harmful"),
    ]
    assert loaded.skipped.reasons == {"no safety flag or no instruction": 1}


# --- what cannot be read --------------------------------------------------------------------------------


def test_a_missing_set_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no test/ToxicChat.json or .*; get it from .*lmsys/toxic-chat"):
        get("ToxicChat", tmp_path)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    write_records(tmp_path, "test/ToxicChat.json", [{"text": "a", "label": 1}])
    with pytest.raises(DataError, match="no row of ToxicChat in it"):
        get("ToxicChat", tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{broken"),
        ("a.json", b"3"),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.xz", b"no xz"),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"text"),
        ("a.json", b"\xff\xfe"),
    ],
)
def test_broken_files_are_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.[a-z.]+"):
        list(read_records(tmp_path / name))


def test_csv_cells_may_hold_lines(tmp_path: Path) -> None:
    path = write_records(tmp_path, "a.csv", [{"a": 'one\ntwo, "three"', "b": "x" * 200_000}])
    assert [row.record for row in read_records(path)] == [{"a": 'one\ntwo, "three"', "b": "x" * 200_000}]
