"""Which answers of a teacher are kept: every gate by hand, and whatever else comes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guardreasoner_vl.protocol import neutralise, parse_verdict
from guardreasoner_vl.teachers.gates import MOST_CHARACTERS, PassedAnswer, RejectedAnswer, gate, steps_of
from guardreasoner_vl.types import GoldLabel, Sample

STEPS = ("The user asks how to bake bread.", "Baking hurts nobody.", "The assistant says to mix flour.")
BOTH = Sample(
    id="a",
    source="toy",
    modality="text",
    prompt="How do I bake bread?",
    response="Mix flour.",
    request_label="unharmful",
    response_label="unharmful",
)


def answer(
    *steps: str, request: str = "unharmful", response: str = "unharmful", heading: str = "## Reasoning Step {}\n"
) -> str:
    body = "\n".join(heading.format(number) + step for number, step in enumerate(steps or STEPS, 1))
    result = f"<result>\nAnswers:\nRequest: {request}\nResponse: {response}\n</result>"
    return f"<think>\n# Task 1\n{body}\n</think>\n{result}"


def reason(text: str, sample: Sample = BOTH, finish_reason: str = "stop") -> str | None:
    result = gate(text, sample, finish_reason)
    return result.reason if isinstance(result, RejectedAnswer) else None


def test_what_passes_is_kept_as_it_is() -> None:
    result = gate(answer(), BOTH, "stop")
    assert isinstance(result, PassedAnswer)
    assert result.reasoning.startswith("# Task 1\n## Reasoning Step 1\nThe user asks how to bake bread.\n## Reasoning")
    assert result.reasoning.endswith("The assistant says to mix flour.")
    assert result.judged == {}


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [
        ("", "stop", "empty"),
        (" \n\t", "stop", "empty"),
        ("", "length", "empty"),
        ("I'm sorry, but I can't help with that.", "stop", "refusal"),
        ("I cannot assist with this request.", "length", "refusal"),
        ("I\u2019m sorry, I can\u2019t assist with that.", "stop", "refusal"),
        (answer(), "content_filter", "refusal"),
        (answer("I'm sorry, I will not describe this.", "So it is unharmful."), "stop", "refusal"),
        (answer('"As an AI I cannot', "So it is unharmful."), "stop", "refusal"),
        (answer(), "length", "unparsable: truncated"),
        (answer(), "none", "unparsable: engine"),
        ("The request is unharmful.", "stop", "unparsable: missing_think"),
        (f"Sure!\n{answer()}", "stop", "unparsable: missing_think"),
        (f"```\n{answer()}\n```", "stop", "unparsable: missing_think"),
        (f"{answer()}\nHope this helps", "stop", "unparsable: trailing_text"),
        (answer(request="safe"), "stop", "unparsable: unknown_label"),
        (answer(request=""), "stop", "unparsable: missing_label"),
        (answer(response="None"), "stop", "unparsable: missing_label"),
        (answer().replace("</think>", ""), "stop", "unparsable: unterminated_think"),
        ('{"request": "unharmful"}', "stop", "unparsable: missing_think"),
        (answer(request="harmful"), "stop", "contradicts the truth"),
        (answer(response="harmful"), "stop", "contradicts the truth"),
        (answer().replace("Reasoning Step", "Thought"), "stop", "no steps"),
        ("<think></think><result>Request: unharmful\nResponse: unharmful</result>", "stop", "no steps"),
        (answer("", " "), "stop", "no steps"),
        (answer(*(f"Thing number {number}." for number in range(11))), "stop", "more than 10 steps"),
        (answer("One.", "Two.", "one"), "stop", "loop"),
        (answer("It is " + "very " * 20 + "good."), "stop", "loop"),
        (answer("The cake is fine. " * 4), "stop", "loop"),
        (answer("so " + "ha" * 150), "stop", "loop"),
        (answer("The user writes \ufffd."), "stop", "a broken character"),
        ("<think>\n## Reasoning Step 1\n" + "The user wants bread. " * 400, "length", "loop"),
        (answer(" ".join(f"word{number}" for number in range(800))), "stop", "too long"),
        (" ".join(f"word{number}" for number in range(800)), "length", "too long"),
    ],
)
def test_each_reason(text: str, finish_reason: str, expected: str) -> None:
    assert reason(text, finish_reason=finish_reason) == expected


@pytest.mark.parametrize(
    "text",
    [
        answer("One step."),
        answer(*(f"Thing number {number}." for number in range(10))),
        answer("It is illegal to sell this.", "It is not so here."),
        answer("No, wait is not asked for here.", "The user is sorry. I'm sorry is what he says."),
        answer("The user says no no no no no no no no.", "Bread."),
        answer("The user asks for bread, and bread, and bread, again.", "So the user asks for bread."),
        answer(heading="Step {}: "),
        answer(heading="**Step {}:** "),
        answer(heading="### Step {}\n"),
        answer(heading="Reasoning Step {}: "),
        answer(request="Harmless", response="UNHARMFUL"),
        "\n" + answer() + "\n\n",
    ],
)
def test_what_is_no_reason_to_reject(text: str) -> None:
    assert reason(text) is None


def test_the_limit_of_length_is_the_whole_answer_s() -> None:
    filler = MOST_CHARACTERS - len(answer("x"))
    words = " ".join(f"word{number}" for number in range(2000))
    assert reason(answer("x" + words[:filler])) is None
    assert reason(answer("x" + words[: filler + 1])) == "too long"


@pytest.mark.parametrize(
    ("reasoning", "steps"),
    [
        ("# Task 1\n## Reasoning Step 1\nOne.\n\n# Task 2\n## Reasoning Step 2\nTwo.\n", ["One.", "Two."]),
        ("Step 1: One.\nStep 2 : Two.\nStep 2 of the recipe stays.", ["One.", "Two.\nStep 2 of the recipe stays."]),
        ("An introduction.\n## Reasoning Step 1: the request\nIt asks.", ["the request\nIt asks."]),
        ("## Reasoning Step 1\n\n## Reasoning Step 2\nTwo.", ["Two."]),
        ("He wrote Step 1: go.", []),
        ("", []),
    ],
)
def test_steps(reasoning: str, steps: list[str]) -> None:
    assert steps_of(reasoning) == steps


def test_a_target_without_a_label_takes_the_teachers_label() -> None:
    row = BOTH.model_copy(update={"request_label": None})
    for word in ("harmful", "unharmful"):
        result = gate(answer(request=word), row, "stop")
        assert isinstance(result, PassedAnswer)
        assert result.judged == {"request": word}
    assert reason(answer(response="harmful"), row) == "contradicts the truth"
    assert reason(answer(request="None"), row) == "unparsable: missing_label"


def test_what_is_not_there_is_not_judged() -> None:
    prompt_only = Sample(id="a", source="toy", modality="text", prompt="Bread?", request_label="unharmful")
    for word in ("None", "unharmful", "harmful"):
        result = gate(answer(response=word), prompt_only, "stop")
        assert isinstance(result, PassedAnswer)
        assert result.judged == {}
    labelled = prompt_only.model_copy(update={"response": " ", "response_label": "harmful"})
    assert reason(answer(response="None"), labelled) is None
    image = Sample(id="a", source="toy", modality="image", images=("a.png",), request_label="harmful")
    assert reason(answer(request="harmful", response="None"), image) is None
    assert reason(answer(request="None", response="None"), image) == "unparsable: missing_label"


def test_markers_in_what_is_kept_are_broken() -> None:
    result = gate(answer("The user writes <|im_end|>.", "Human user: hi"), BOTH, "stop")
    assert isinstance(result, PassedAnswer)
    assert "\u2039|im_end|>" in result.reasoning
    assert "<|im_end|>" not in result.reasoning
    # A field that begins a line, as in the transcript.
    assert "\n| Human user: hi" in result.reasoning


# --- whatever comes -------------------------------------------------------------------------------------

LABEL: st.SearchStrategy[GoldLabel | None] = st.sampled_from(("harmful", "unharmful", None))
SAMPLES = st.builds(
    lambda prompt, response, first, second: BOTH.model_copy(
        update={"prompt": prompt, "response": response, "request_label": first, "response_label": second}
    ),
    st.sampled_from(("", "Bread?")),
    st.sampled_from((None, "", "Mix.")),
    LABEL,
    LABEL,
)
PIECE = st.sampled_from(
    [
        *("<think>", "</think>", "<result>", "</result>", "\n## Reasoning Step 1\n", "\nStep 2: ", "Answers:\n"),
        *("Request: harmful\n", "Response: unharmful\n", "Response: None\n", "bread ", "I'm sorry", "<|im_end|>", "\n"),
    ]
)
WORDS = st.lists(st.sampled_from(("cake", "bread", "and", "flour", "no")), max_size=60).map(" ".join)
WHOLE = st.builds(
    lambda steps, first, second: answer(*steps, request=first, response=second),
    st.lists(st.one_of(st.text(max_size=20), WORDS), max_size=12),
    st.sampled_from(("harmful", "unharmful", "None")),
    st.sampled_from(("harmful", "unharmful", "None")),
)
ANSWERS = st.one_of(st.text(), st.lists(PIECE).map("".join), WHOLE)
REASON = re.compile(
    r"unparsable: [a-z_]+|contradicts the truth|no steps|more than 10 steps|refusal|loop|empty|too long"
    r"|a broken character"
)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(ANSWERS, SAMPLES, st.sampled_from(("stop", "length", "content_filter", "odd")))
def test_kept_or_rejected_with_a_known_reason_and_never_against_the_truth(
    text: str, sample: Sample, finish_reason: str
) -> None:
    result = gate(text, sample, finish_reason)
    if isinstance(result, RejectedAnswer):
        assert REASON.fullmatch(result.reason)
        return
    has_prompt, has_response = bool(sample.prompt), bool(sample.response)
    parsed = parse_verdict(text, has_prompt, has_response, "stop")
    assert parsed.reason is None
    assert finish_reason == "stop"
    assert not has_prompt or parsed.request == (sample.request_label or result.judged["request"])
    assert not has_response or parsed.response == (sample.response_label or result.judged["response"])
    assert 1 <= len(steps_of(result.reasoning)) <= 10
    assert neutralise(result.reasoning) == result.reasoning
    again = f"<think>\n{result.reasoning}\n</think>{text.rpartition('</think>')[2]}"
    assert gate(again, sample, "stop") == result


@given(st.lists(st.sampled_from(("ha", "so", "cake")), min_size=1, max_size=20), st.integers(4, 12))
def test_a_phrase_said_over_and_over_is_a_loop_and_said_thrice_it_is_not(phrase: list[str], times: int) -> None:
    said = [f"{word}{place}" for place, word in enumerate(phrase)]
    enough = times * len(said) >= 12
    assert (reason(answer(f"It says: {' '.join(said * times)}.")) == "loop") is enough
    assert reason(answer(f"It says: {' '.join(said * 3)}.")) is None


def test_a_long_answer_is_looked_through_quickly() -> None:
    import time

    started = time.perf_counter()
    for text in ("a" * 2_000_000, "a b " * 500_000, "## Reasoning Step 1\n" * 100_000, " " * 2_000_000 + "x"):
        assert reason(text) is not None
    assert time.perf_counter() - started < 2
