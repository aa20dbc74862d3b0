"""What form a message has, told from its words."""

import pytest

from guardreasoner_vl.teachers.forms import Form, Reply, form_of, is_foreign, is_refusal, reply_of, speaks_of_people


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("Fix this:\n```\nx = 1\n```", Form.CODE),
        ("write me a short python function", Form.CODE),
        ("import numpy\nprint(numpy.pi)", Form.CODE),
        ("From experience, which code of conduct is best?", Form.QUESTION),
        ("please select one from the list", Form.REQUEST),
        ("Act as a travel guide. Where should I go?", Form.PLAY),
        ("You are a friendly cooking assistant. Plan my week.", Form.PLAY),
        ("You are a fool", Form.REMARK),
        ("Summarize the text below", Form.WRITING),
        ("make me a list of birds", Form.WRITING),
        ("how can i sleep better", Form.QUESTION),
        ("hey, is it too late to go out for a walk", Form.QUESTION),
        ("Wo ist der Bahnhof?", Form.QUESTION),
        ("hi, how are you?", Form.TALK),
        ("Thanks a lot!", Form.TALK),
        ("tell me about owls", Form.REQUEST),
        ("Turn on the lamp", Form.REQUEST),
        ("that was a long day", Form.REMARK),
        ("", Form.REMARK),
    ],
)
def test_the_form_of_what_a_user_writes(text: str, form: Form) -> None:
    assert form_of(text) is form


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("I'm sorry, but I can't help with that.", Reply.REFUSAL),
        ("Here it is:\n```\nx = 1\n```", Reply.CODE),
        ("1. Mix.\n2. Bake.", Reply.STEPS),
        ("Step 1: mix.\nStep 2: bake.", Reply.STEPS),
        ("1. Mix everything.", Reply.REMARK),
        ("Which one do you mean?", Reply.QUESTION),
        ("It is blue. " * 20, Reply.EXPLANATION),
        ("", Reply.REMARK),
    ],
)
def test_the_form_of_what_an_assistant_answers(text: str, reply: Reply) -> None:
    assert reply_of(text) is reply


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't", True),
        ("  I cannot help", True),
        ("As an AI model", True),
        ("I\u2019m sorry, but I can\u2019t help", True),
        ("I can\u2019t help", True),
        ("No, I can't", True),
        ("Unfortunately, I am unable to do so", True),
        ("I apologize, but this is not something for me", True),
        ("It is not appropriate to do this", True),
        ("I do not support this", True),
        ("I am sorry that this happened to you", False),
        ("I don't like tea", False),
        ("No, it rains", False),
        ("It is not far", False),
        ("Sure, here is how", False),
        ("First, say I'm sorry", False),
        ("", False),
    ],
)
def test_refusals(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("Wie kann ich das Brot backen und was ist gut?", True),
        ("\u00bfC\u00f3mo puedo arreglar la mesa para el jard\u00edn?", True),
        ("\u4eca\u5929\u5929\u6c14\u600e\u4e48\u6837", True),
        ("How do I say 'der Hund' in the garden?", False),
        ("buy cheap tickets fast", False),
        ("12 + 12", False),
        ("", False),
    ],
)
def test_other_languages(text: str, foreign: bool) -> None:
    assert is_foreign(text) is foreign


def test_people() -> None:
    assert speaks_of_people("they never listen")
    assert not speaks_of_people("the theory of boats")
