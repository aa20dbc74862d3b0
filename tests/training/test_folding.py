"""Tests of the normaliser of a small guard's tokenizer."""

import random
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from guardreasoner_vl.evaluation.perturbations import REWRITES
from guardreasoner_vl.sources.variation import FULL_WIDTH
from guardreasoner_vl.training.folding import folding

SENTENCE = "Please explain how to bake sourdough bread for a picnic."
ADDED = ("<|image_pad|>", "harmful")


@pytest.mark.parametrize("seed", range(20))
def test_hidden_marks_are_removed(seed: int) -> None:
    disguised = REWRITES["zero-width"](SENTENCE, random.Random(seed))

    assert disguised != SENTENCE
    assert folding().normalize_str(disguised) == SENTENCE


@pytest.mark.parametrize("seed", range(20))
def test_lookalikes_between_latin_letters_are_folded(seed: int) -> None:
    disguised = REWRITES["homoglyphs"](SENTENCE, random.Random(seed))
    changed = sum(a != b for a, b in zip(disguised, SENTENCE, strict=True))

    folded = folding().normalize_str(disguised)

    assert changed
    # A word of lookalikes alone, here "a", could be a word of the other script, and stays.
    assert sum(a != b for a, b in zip(folded, SENTENCE, strict=True)) <= 1


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("".join(FULL_WIDTH.get(letter, letter) for letter in SENTENCE), SENTENCE),
        ("\U0001d41b\U0001d428\U0001d428\U0001d424", "book"),
        ("".join(chr(0xE0000 + ord(letter)) for letter in "read me"), "read me"),
        ("b\u043e\u043e\u043e\u043ek", "booook"),
        ("\u202eabc\u202c", "abc"),
        ("caf\u00e9 na\u00efve \u00fcber", "caf\u00e9 na\u00efve \u00fcber"),
    ],
    ids=["full width", "mathematical letters", "tags", "several lookalikes", "marks of direction", "accents"],
)
def test_disguised_latin_letters_are_folded(text: str, folded: str) -> None:
    assert folding().normalize_str(text) == folded


@pytest.mark.parametrize(
    "text",
    [
        "\u0441\u0430\u0445\u0430\u0440 \u0438 \u043e\u0441\u0430",
        "\u03a3\u03c9\u03ba\u03c1\u03ac\u03c4\u03b7\u03c2 wrote nothing",
        "\u041c\u043e\u0441\u043a\u0432\u0430 (Moscow)",
        "\u4f60\u597d, world",
        "line one\n\tline two\r\n",
    ],
)
def test_words_of_other_scripts_stay(text: str) -> None:
    assert folding().normalize_str(text) == text


@given(st.text(alphabet="harmful <>|/\u0430\u0456\u200b\u00ad\uff1c\uff5cimage_pad", max_size=40))
@example("<|im\u0430ge_pad|>")
@example("<|image\u200b_pad|>")
@example("\uff1c|image_pad|>")
@example("harmf\u057dl")
def test_folding_forges_no_added_token(text: str) -> None:
    tokenizer = _letters()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])

    added = [tokenizer.token_to_id(token) for token in ADDED]
    expected = sum(text.count(token) for token in ADDED)

    assert sum(number in added for number in tokenizer.encode(text).ids) == expected


def test_a_tokenizer_stores_it() -> None:
    stored = Tokenizer.from_str(_letters().to_str())

    assert stored.decode(stored.encode("b\u200b\u043eok").ids) == "book"


def _letters() -> Tokenizer:
    """A byte-level tokenizer without merges, which folds."""
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = folding()
    return tokenizer


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("HOW DO I BAKE A CAKE?", "how do i bake a cake?"),
        ("WIE BACKE ICH EINEN \u00c4PFELKUCHEN?", "wie backe ich einen \u00e4pfelkuchen?"),
        ("Hello. PLEASE HELP ME NOW, thanks", "Hello. please help me now, thanks"),
        ("She works at NASA, I think.", "She works at NASA, I think."),
        ("MAX_SIZE = 10", "MAX_SIZE = 10"),
        ("READ THIS", "READ THIS"),
        ("            Hello there, Ann", "            Hello there, Ann"),
        ("1234567890 I think so. U.S.A. and U.K.", "1234567890 I think so. U.S.A. and U.K."),
        ("HOW+DO+I BAKE 12 CAKES = BREAD", "how+do+i bake 12 cakes = bread"),
        ("JAK UPIEC \u0141ADNE CIASTO", "jak upiec \u0142adne ciasto"),
        ("AI\u2060 assistant", "AI assistant"),
        (
            "\u041c\u041e\u0421\u041a\u0412\u0410 \u0418 \u041a\u0418\u0415\u0412",
            "\u041c\u041e\u0421\u041a\u0412\u0410 \u0418 \u041a\u0418\u0415\u0412",
        ),
    ],
    ids=[
        "sentence",
        "umlauts",
        "part of a text",
        "acronym",
        "constant",
        "brief",
        "indented",
        "initials",
        "signs",
        "Polish",
        "the mark",
        "other scripts",
    ],
)
def test_sentences_in_capitals_become_small(text: str, folded: str) -> None:
    assert folding().normalize_str(text) == folded


@given(st.text(alphabet="ABCDE \u00c4\u00d7\u00dfabc.,1\u2060", max_size=60))
def test_small_letters_change_nothing_but_the_case(text: str) -> None:
    assert folding().normalize_str(text).lower() == unicodedata.normalize("NFKC", text.replace("\u2060", "")).lower()
