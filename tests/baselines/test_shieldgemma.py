"""ShieldGemma 2 on a tiny local model of its layout, with weights that are set by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ImageProcessor,
    PreTrainedTokenizerFast,
    ShieldGemma2Config,
    ShieldGemma2ForImageClassification,
    ShieldGemma2Processor,
)

from guardreasoner_vl.baselines.shieldgemma import ShieldGemma2
from guardreasoner_vl.errors import ModelError
from guardreasoner_vl.types import Exchange
from tests.made_images import image

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_image>", "<end_of_image>", "<image_soft_token>", "Yes", "No"]
TEMPLATE = (
    "{{ bos_token }}{% for part in messages[0].content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %} {{ part.text }}{% endif %}{% endfor %}"
)
POLICIES = {"one": "nothing dangerous", "two": "nothing violent"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the real classes whose answers depend on the image."""
    folder = tmp_path_factory.mktemp("shieldgemma")
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    images = Gemma3ImageProcessor(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    processor: Any = ShieldGemma2Processor(
        images, wrapped, chat_template=TEMPLATE, image_seq_length=4, policy_definitions=POLICIES
    )
    processor.save_pretrained(folder)
    text = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 7,
    }  # fmt: skip
    config = ShieldGemma2Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        boi_token_index=4,
        eoi_token_index=5,
        image_token_index=6,
        yes_token_index=7,
        no_token_index=8,
    )
    torch.manual_seed(0)
    model: Any = ShieldGemma2ForImageClassification(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_the_worst_policy_of_the_worst_image_counts(folder: Path) -> None:
    guard = ShieldGemma2(str(folder))
    assert guard.settings == {"adapter": "shieldgemma-2", "policies": POLICIES}
    first, second = image(60, 60), image(28, 90)
    alone = list(guard.moderate_batch([Exchange("What is this?", (seen,)) for seen in (first, second)]))
    (both,) = guard.moderate_batch([Exchange(None, (first, second), "A cake.")])
    scores = [verdict.request.score for verdict in alone]
    assert None not in scores
    assert scores[0] != scores[1]
    assert both.request.score == pytest.approx(max(score for score in scores if score is not None), abs=1e-5)
    for verdict in (*alone, both):
        score = verdict.request.score or 0.0
        assert verdict.request.label == ("harmful" if score > 0.5 else "unharmful")
        assert verdict.flagged is (score > 0.5)
        assert verdict.response.label == "not_applicable"
    expected = _probabilities(folder, first)
    assert alone[0].request.score == pytest.approx(expected)


def _probabilities(folder: Path, seen: Any) -> float:
    """The same by hand: the highest softmax of the Yes and No logits, a policy at a time."""
    processor, probabilities = ShieldGemma2Processor.from_pretrained(folder), []
    network = ShieldGemma2ForImageClassification.from_pretrained(folder, dtype="auto").eval()
    for policy in POLICIES:
        inputs = processor(images=[seen.open()], policies=[policy], return_tensors="pt")
        with torch.inference_mode():
            logits = network.model(**inputs).logits[0, -1, [7, 8]]
        probabilities.append(float(logits.softmax(-1)[0]))
    return max(probabilities)


def test_what_it_cannot_judge_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with ShieldGemma2(str(folder)) as guard:
        text, broken = guard.moderate_batch([Exchange("Hi"), Exchange("Hi", (b"no image",))])
        assert text.error is not None
        assert (text.error.code, text.request.label, text.flagged, text.action) == (
            "unsupported", "error", None, "block"
        )  # fmt: skip
        assert broken.error is not None
        assert broken.error.code == "invalid_image"
        monkeypatch.setattr(ShieldGemma2ForImageClassification, "forward", fails)
        (failed,) = guard.moderate_batch([Exchange(None, (image(28, 28),))])
        assert failed.error is not None
        assert (failed.error.code, failed.request.label) == ("engine", "error")
        assert "RuntimeError" in failed.error.message


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="cannot be loaded as ShieldGemma 2"):
        ShieldGemma2(str(tmp_path))
