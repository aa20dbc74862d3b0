"""The transformers engine on a tiny random model, with plain transformers as the oracle."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from guardreasoner_vl.engines import transformers_engine
from guardreasoner_vl.engines.decoding import Decoder
from guardreasoner_vl.engines.qwen import IMAGE_PAD, QwenInputs
from guardreasoner_vl.engines.sampling import Vocabulary, choose_tokens
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.errors import InputError
from guardreasoner_vl.images.geometry import PixelBudget
from guardreasoner_vl.protocol import CANDIDATES, FAST_PREFIX, IMAGE, RESPONSE_FIELD, Message, build_messages
from guardreasoner_vl.types import CheckedImage, Exchange
from tests.engines.conformance import FIELDS, SLOTS, EngineConformance, Pieces, asked, mismatched, timeless
from tests.made_images import image
from tests.tiny_model import set_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from guardreasoner_vl.engines.base import Engine, EngineRequest, EngineResult
    from guardreasoner_vl.engines.sampling import GenerationRow

pytestmark = pytest.mark.slow
WITH_COMMON_HEAD = (" undone", " unlike")
"""Words whose first tokens are the same in the tiny tokenizer (a test below checks it)."""


@pytest.fixture
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine.load(str(tiny_model), dtype="fp32")


class TestTransformers(EngineConformance):
    @pytest.fixture
    def engine(self, tiny_model: Path) -> Engine:
        return TransformersEngine.load(str(tiny_model), dtype="fp32")


class TestTransformersInBf16(EngineConformance):
    @pytest.fixture
    def engine(self, tiny_model: Path) -> Engine:
        return TransformersEngine.load(str(tiny_model), dtype="bf16")


def request_for(exchange: Exchange, **values: Any) -> EngineRequest:
    images = tuple(shown for shown in exchange.all_images if isinstance(shown, CheckedImage))
    return replace(asked(), messages=build_messages(exchange), images=images, **values)


def mixed() -> list[EngineRequest]:
    """Text, image and both, of different lengths, one and two images, with and without a forced prefix."""
    return [
        request_for(Exchange("How do I bake bread?")),
        request_for(Exchange(None, (image(90, 57),))),
        request_for(Exchange("Please describe a kite. " * 6, (image(56, 56),), "It is warm.")),
        request_for(Exchange("The garden", (image(200, 60), image(56, 112)), "Yes.")),
        request_for(Exchange("x", response="Tomato soup. " * 12), forced_prefix="<think>\nThe image"),
    ]


def hf_inputs(engine: TransformersEngine, requests: Sequence[EngineRequest]) -> dict[str, torch.Tensor]:
    """A left-padded batch for transformers itself, which finds positions and masks on its own."""
    rows = [engine.inputs.encode(r.messages, r.images, r.forced_prefix, r.pixels).ids for r in requests]
    longest, pad = max(map(len, rows)), engine.inputs.token_id["<|endoftext|>"]
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": (ids == engine.inputs.token_id[IMAGE_PAD]).int(),
    }
    if images := [shown.open() for request in requests for shown in request.images]:
        budget = engine.inputs.budget
        processor = Qwen2VLImageProcessorPil(min_pixels=budget.min_pixels, max_pixels=budget.max_pixels)
        inputs |= processor(images=images, return_tensors="pt")
    return inputs


def hf_greedy(engine: TransformersEngine, requests: Sequence[EngineRequest], count: int) -> list[list[int]]:
    """transformers' own greedy tokens, end of turn left out."""
    vocabulary = Vocabulary(engine.inputs)
    ends = sorted(vocabulary.end_ids)
    inputs = hf_inputs(engine, requests)
    output = engine.network.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=count,
        suppress_tokens=vocabulary.never,
        eos_token_id=ends,
        pad_token_id=engine.inputs.token_id["<|endoftext|>"],
    )
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in rows]


def hf_logprobs(engine: TransformersEngine, request: EngineRequest, tokens: Sequence[int] = ()) -> torch.Tensor:
    """Log-probabilities of the next token after prompt + `tokens`, from one full forward without a cache."""
    inputs = hf_inputs(engine, [request])
    more = torch.tensor([list(tokens)], dtype=torch.long)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], more), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.cat((inputs["mm_token_type_ids"], torch.zeros_like(more).int()), 1)
    with torch.no_grad():
        logits: torch.Tensor = engine.network(**inputs, use_cache=False).logits[0, -1]
    return logits.log_softmax(-1)


class TestAgainstTransformers:
    def test_greedy_tokens_are_equal_in_one_batch(self, engine: TransformersEngine) -> None:
        results = engine.generate([replace(request, max_new_tokens=40) for request in mixed()])
        assert [result.error for result in results] == [None] * 5
        assert [list(result.token_ids) for result in results] == hf_greedy(engine, mixed(), 40)
        assert len({result.token_ids[:5] for result in results}) == 5

    def test_rows_that_end_early_leave_the_others_alone(self, engine: TransformersEngine) -> None:
        limits = [3, 30, 1, 12, 21]
        requests = [replace(request, max_new_tokens=limit) for request, limit in zip(mixed(), limits, strict=True)]
        expected = hf_greedy(engine, mixed(), 30)
        for result, tokens, limit in zip(engine.generate(requests), expected, limits, strict=True):
            assert list(result.token_ids) == tokens[:limit]
            assert result.finish_reason == ("length" if len(tokens) >= limit else "stop")

    def test_a_batch_equals_its_rows_alone(self, engine: TransformersEngine) -> None:
        requests = [replace(r, label_fields=FIELDS, candidates=CANDIDATES, ban_empty_think=True) for r in mixed()]
        together = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests]
        assert [result.token_ids for result in together] == [result.token_ids for result in alone]
        scored = [replace(request, forced_prefix=FAST_PREFIX) for request in mixed()]
        for score, request in zip(engine.score(scored, SLOTS, CANDIDATES), scored, strict=True):
            (single,) = engine.score([request], SLOTS, CANDIDATES)
            assert score.chosen == single.chosen
            for logprobs, expected in zip(score.logprobs, single.logprobs, strict=True):
                assert logprobs == pytest.approx(expected, abs=1e-4)

    def test_small_batches_equal_large_ones(self, engine: TransformersEngine, tiny_model: Path) -> None:
        narrow = TransformersEngine.load(str(tiny_model), dtype="fp32", max_rows=2, max_tokens=150)
        assert [r.token_ids for r in narrow.generate(mixed())] == [r.token_ids for r in engine.generate(mixed())]

    def test_scores_equal_a_full_forward(self, engine: TransformersEngine) -> None:
        requests = [replace(request, forced_prefix=FAST_PREFIX) for request in mixed()]
        self.assert_scores(engine, requests, CANDIDATES)
        common, _ = Vocabulary(engine.inputs).first_difference(CANDIDATES)
        assert common == []

    def test_scores_equal_a_full_forward_where_words_share_their_first_tokens(self, engine: TransformersEngine) -> None:
        common, _ = Vocabulary(engine.inputs).first_difference(WITH_COMMON_HEAD)
        assert common
        self.assert_scores(engine, [replace(r, forced_prefix=FAST_PREFIX) for r in mixed()], WITH_COMMON_HEAD)

    @staticmethod
    def assert_scores(
        engine: TransformersEngine, requests: Sequence[EngineRequest], candidates: tuple[str, ...]
    ) -> None:
        """Every slot's values against a forward over the whole text."""
        tokens = engine.inputs.tokens
        common, ids = Vocabulary(engine.inputs).first_difference(candidates)
        for request, result in zip(requests, engine.score(requests, SLOTS, candidates), strict=True):
            assert result.error is None
            first = hf_logprobs(engine, request, common)[ids]
            assert result.logprobs[0] == pytest.approx(first.tolist(), abs=1e-4)
            chosen = candidates[int(first.argmax())]
            second = hf_logprobs(engine, request, [*tokens(chosen + RESPONSE_FIELD), *common])[ids]
            assert result.logprobs[1] == pytest.approx(second.tolist(), abs=1e-4)
            assert result.chosen == (int(first.argmax()), int(second.argmax()))
            read = len(tokens(chosen + RESPONSE_FIELD)) + len(common)
            assert result.usage.prompt_tokens == engine.count_tokens(request) + read
            assert result.usage.completion_tokens == 2

    def test_the_first_slot_s_text_is_read(self, engine: TransformersEngine) -> None:
        head, field = FAST_PREFIX.removesuffix("Request:"), "Request:"
        (split,) = engine.score([asked(forced_prefix=head)], (field, RESPONSE_FIELD), CANDIDATES)
        (whole,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, CANDIDATES)
        assert split.logprobs == whole.logprobs

    def test_label_logprobs_equal_a_full_forward(
        self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result_block = "<result>\nAnswers:\nRequest: unharmful\nResponse: harmful\n</result>"
        answer = f"<think>\nA kite: Request: harmful\n</think>\n{result_block}"
        follow(monkeypatch, engine, answer)
        requests = [replace(r, forced_prefix="", label_fields=FIELDS, candidates=CANDIDATES) for r in mixed()]
        requests = [replace(request, max_new_tokens=60 + 7 * at) for at, request in enumerate(requests)]
        ids = Vocabulary(engine.inputs).first_difference(CANDIDATES)[1]
        for request, result in zip(requests, engine.generate(requests), strict=True):
            assert (result.text, result.finish_reason) == (answer, "stop")
            assert set(result.label_logprobs) == set(FIELDS)
            for field, logprobs in result.label_logprobs.items():
                before = answer[: answer.rindex(field) + len(field)]
                expected = hf_logprobs(engine, request, engine.inputs.tokens(before))[ids]
                assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)

    def test_label_logprobs_at_a_later_token(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = "<think>\nA kite.\n</think>\n<result>\nAnswers:\nRequest: unlike\nResponse: harmful\n</result>"
        follow(monkeypatch, engine, answer)
        request = replace(asked(), max_new_tokens=80, label_fields=FIELDS, candidates=WITH_COMMON_HEAD)
        (result,) = engine.generate([request])
        common, ids = Vocabulary(engine.inputs).first_difference(WITH_COMMON_HEAD)
        before = engine.inputs.tokens(answer[: answer.index(" unlike")])
        expected = hf_logprobs(engine, request, [*before, *common])[ids]
        assert result.label_logprobs == {"Request:": pytest.approx(expected.tolist(), abs=1e-4)}

    def test_a_label_right_after_the_forced_prefix(self, engine: TransformersEngine) -> None:
        request = replace(asked(forced_prefix=FAST_PREFIX), label_fields=FIELDS, candidates=CANDIDATES)
        (result,) = engine.generate([request])
        ids = Vocabulary(engine.inputs).first_difference(CANDIDATES)[1]
        expected = hf_logprobs(engine, request)[ids]
        assert result.label_logprobs["Request:"] == pytest.approx(expected.tolist(), abs=1e-4)

    def test_each_request_has_its_own_candidates(self, engine: TransformersEngine) -> None:
        base = replace(asked(forced_prefix=FAST_PREFIX), label_fields=FIELDS)
        pairs = [CANDIDATES, (" bread", " kite"), CANDIDATES]
        together = engine.generate([replace(base, candidates=pair) for pair in pairs])
        for result, pair in zip(together, pairs, strict=True):
            (alone,) = engine.generate([replace(base, candidates=pair)])
            assert result.label_logprobs["Request:"] == pytest.approx(alone.label_logprobs["Request:"], abs=1e-4)

    def test_the_prefix_cache_changes_nothing(self, engine: TransformersEngine) -> None:
        decoder = Decoder(engine.network, engine.inputs)
        requests = mixed()
        rows = [engine.inputs.encode(r.messages, r.images, r.forced_prefix) for r in requests]
        images = [shown.open() for request in requests for shown in request.images]
        shared = rows[0].ids[
            : min(next(at for at, ids in enumerate(zip(*(r.ids for r in rows), strict=False)) if len(set(ids)) > 1), 40)
        ]
        assert len(shared) > 10
        with_cache = decoder.prefill(rows, images, decoder.compute_prefix(shared))
        without = decoder.prefill(rows, images)
        further = [[300], [301, 302, 303], [304, 305], [306], [307, 308]]
        for _ in range(3):
            torch.testing.assert_close(with_cache.logits, without.logits, atol=1e-4, rtol=1e-4)
            decoder.extend(with_cache, further)
            decoder.extend(without, further)
            kept = torch.tensor([0, 2, 3][: len(further)])
            if len(further) == 5:
                with_cache.keep_rows(kept)
                without.keep_rows(kept)
                further = [further[at] for at in kept.tolist()]

    def test_rows_that_read_different_lengths_equal_full_forwards(self, engine: TransformersEngine) -> None:
        decoder = Decoder(engine.network, engine.inputs)
        requests = mixed()[:4]
        rows = [engine.inputs.encode(r.messages, r.images, r.forced_prefix) for r in requests]
        images = [shown.open() for request in requests for shown in request.images]
        batch = decoder.prefill(rows, images)
        read: list[list[int]] = [[], [], [], []]
        for further in ([[300], [301, 302, 303], [304, 305], [306]], [[307, 308, 309, 310], [311], [312, 313], [314]]):
            decoder.extend(batch, further)
            read = [before + tokens for before, tokens in zip(read, further, strict=True)]
            for request, tokens, logits in zip(requests, read, batch.logits, strict=True):
                expected = hf_logprobs(engine, request, tokens)
                torch.testing.assert_close(logits.log_softmax(-1), expected, atol=1e-4, rtol=1e-4)

    def test_cached_tokens_are_counted(self, engine: TransformersEngine) -> None:
        first, second = engine.generate([asked()])[0], engine.generate([asked("Other.")])[0]
        cached = second.usage.cached_tokens
        assert first.usage.cached_tokens == cached
        assert 0 < cached < second.usage.prompt_tokens == engine.count_tokens(asked("Other."))
        user_only = replace(asked(), messages=(Message("user", "Hello."),))
        assert [r.usage.cached_tokens for r in engine.generate([user_only, asked()])] in ([0, 0], [0, cached])
        assert engine.generate([asked()])[0].usage.cached_tokens == cached

    def test_a_first_call_without_a_system_message_leaves_the_cache_usable(self, engine: TransformersEngine) -> None:
        engine.generate([replace(asked(), messages=(Message("user", "Hello."),))])
        assert engine.generate([asked()])[0].usage.cached_tokens > 0

    def test_a_prompt_that_is_the_prefix_and_nothing_more(self, engine: TransformersEngine) -> None:
        decoder = Decoder(engine.network, engine.inputs)
        row = engine.inputs.encode(asked().messages)
        assert not decoder.compute_prefix(row.ids).starts(row.ids)
        prefix = decoder.compute_prefix(row.ids[:-1])
        assert prefix.starts(row.ids)
        logits = decoder.prefill([row], [], prefix).logits
        torch.testing.assert_close(logits, decoder.prefill([row], []).logits, atol=1e-4, rtol=1e-4)

    def test_a_row_with_nothing_to_read_is_refused(self, engine: TransformersEngine) -> None:
        decoder = Decoder(engine.network, engine.inputs)
        batch = decoder.prefill([engine.inputs.encode(asked().messages)] * 2, [])
        with pytest.raises(ValueError, match="keep_rows"):
            decoder.extend(batch, [[5], []])


def test_an_answer_is_streamed_token_by_token_and_can_be_cancelled(
    monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine
) -> None:
    follow(monkeypatch, engine, "a cafe, caf\u00e9, \U0001f35e bread and butter and more")
    whole, cut = Pieces(), Pieces(most=3)
    requests = [replace(asked(), listener=listener, max_new_tokens=200) for listener in (whole, cut)]
    first, second, third = engine.generate([*requests, replace(asked(), max_new_tokens=200)])
    assert "".join(whole.heard) == first.text == third.text == "a cafe, caf\u00e9, \U0001f35e bread and butter and more"
    assert len(whole.heard) > 5
    assert not any("\ufffd" in piece for piece in whole.heard)
    assert (second.finish_reason, second.error_code, len(cut.heard)) == ("error", "cancelled", 3)


def follow(monkeypatch: pytest.MonkeyPatch, engine: TransformersEngine, *answers: str) -> None:
    """Make every row choose `answers`' tokens, the first choice first, whatever the model says.

    Where a choice is banned the next answer's token at that place is taken. The log-probabilities stay the model's.
    """
    wanted = [[*engine.inputs.tokens(answer), engine.inputs.token_id["<|im_end|>"]] for answer in answers]

    def choose(logits: torch.Tensor, rows: Sequence[GenerationRow], vocabulary: Vocabulary) -> list[int]:
        logits[:] = -100.0
        for row, values in zip(rows, logits, strict=True):
            place = len(row.tokens)
            for rank, tokens in enumerate(wanted):
                if place < len(tokens):
                    values[tokens[place]] = max(float(values[tokens[place]]), -float(rank))
        return choose_tokens(logits, rows, vocabulary)

    monkeypatch.setattr(transformers_engine, "choose_tokens", choose)


def changed_logits(engine: TransformersEngine, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Let `change` edit the network's logits of shape (rows, tokens, vocabulary) in place, or return others."""

    def changed(_: Any, __: Any, output: Any) -> None:
        logits = change(output.logits)
        if logits is not None:
            output.logits = logits

    engine.network.register_forward_hook(changed)


class TestWhatMayBeWritten:
    def test_an_empty_think_is_banned(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        tail = "\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: harmful\n</result>"
        follow(monkeypatch, engine, "<think>" + tail, "<think> bread" + tail)
        (free,) = engine.generate([replace(asked(), max_new_tokens=60)])
        (banned,) = engine.generate([replace(asked(), max_new_tokens=60, ban_empty_think=True)])
        assert free.text.startswith("<think>\n</think>")
        reasoning = banned.text.partition("<think>")[2].partition("</think>")[0]
        assert reasoning.strip()

    @pytest.mark.parametrize("start", ["", "<", "<think", "<think>", "<think>\n", "<think>\n \n"])
    def test_no_text_that_the_model_wants_gets_around_the_ban(self, start: str, engine: TransformersEngine) -> None:
        """Forces the end of think after every forced prefix."""
        closing = [number for number, piece in Vocabulary(engine.inputs).texts.items() if "</" in piece]
        ends = sorted(engine.inputs.end_ids)

        def closes(logits: torch.Tensor) -> None:
            logits[..., closing] += 1e6
            logits[..., ends] += 1e5
            logits[..., engine.inputs.tokenizer.token_to_id("<")] += 1e4

        changed_logits(engine, closes)
        request = replace(asked(forced_prefix=start), ban_empty_think=True, max_new_tokens=12)
        (result,) = engine.generate([request])
        after = result.text.partition("<think>")[2]
        assert after.partition("</think>")[0].strip() or "</think>" not in after
        assert after or "<think>" not in result.text

    @pytest.mark.parametrize(
        ("token", "empty"),
        [("></", "<think></think>"), ("<think></think>", "<think></think>"), ("> <", "<think> </think>")],
    )
    def test_tokens_that_open_and_close_at_once_are_banned(
        self, token: str, empty: str, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Large tokenizers have such tokens, for HTML."""
        engine.inputs.tokenizer.add_tokens([token])
        engine.network.resize_token_embeddings(engine.inputs.tokenizer.get_vocab_size(), mean_resizing=False)
        engine = TransformersEngine.of_network(engine.network, engine.inputs, engine.model)
        tail = "\n<result>\nRequest: harmful\nResponse: harmful\n</result>"
        follow(monkeypatch, engine, empty + tail, "<think> bread</think>" + tail)
        request = replace(asked(), max_new_tokens=60)
        (free,) = engine.generate([request])
        (banned,) = engine.generate([replace(request, ban_empty_think=True)])
        assert token in free.text
        assert token not in banned.text

    def test_placeholders_are_never_sampled(self, engine: TransformersEngine) -> None:
        never = Vocabulary(engine.inputs).never
        assert engine.inputs.token_id[IMAGE_PAD] in never

        def prefers_placeholders(logits: torch.Tensor) -> None:
            logits[..., never] += 1e4

        changed_logits(engine, prefers_placeholders)
        requests = [replace(asked(), temperature=2.0, seed=seed, max_new_tokens=40) for seed in range(4)]
        for result in engine.generate([*requests, asked()]):
            assert result.error is None
            assert not set(result.token_ids) & set(never)

    def test_ids_outside_of_the_tokenizer_are_never_sampled(self, engine: TransformersEngine) -> None:
        """Released checkpoints have more rows in the embedding than tokens in the tokenizer."""
        size = engine.inputs.tokenizer.get_vocab_size()

        def padded(logits: torch.Tensor) -> torch.Tensor:
            return torch.cat((logits, torch.full((*logits.shape[:-1], 50), 1e4)), -1)

        changed_logits(engine, padded)
        for result in engine.generate([asked(), replace(asked(), temperature=2.0, seed=1)]):
            assert result.error is None
            assert max(result.token_ids) < size

    def test_a_seed_repeats_and_neighbours_do_not_matter(self, engine: TransformersEngine) -> None:
        sampled = replace(asked(), temperature=1.0, top_p=0.95, seed=11)
        (alone,) = engine.generate([sampled])
        (again,) = engine.generate([sampled])
        others = [replace(asked("A paper boat " * length), temperature=1.0, seed=length) for length in range(1, 4)]
        among = engine.generate([*others, sampled, asked()])[3]
        assert alone.token_ids == again.token_ids == among.token_ids
        assert engine.generate([replace(sampled, seed=12)])[0].token_ids != alone.token_ids
        unseeded = replace(sampled, seed=None)
        assert len({result.token_ids for result in engine.generate([unseeded] * 4)}) > 1

    @pytest.mark.parametrize(("further", "finish"), [(0, "stop"), (8, "stop"), (9, "length"), (20, "length")])
    def test_at_most_eight_tokens_after_the_result(
        self, further: int, finish: str, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = "<think>\nA kite.\n</think>\n<result>\nRequest: harmful\nResponse: harmful\n</result>"
        follow(monkeypatch, engine, answer + " bread" * further)
        (result,) = engine.generate([replace(asked(), max_new_tokens=200)])
        assert result.finish_reason == finish
        assert result.text == answer + " bread" * min(further, 9)

    def test_max_new_tokens(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        follow(monkeypatch, engine, "Please describe a kite in three short and friendly sentences.")
        whole = len(engine.inputs.tokens("Please describe a kite in three short and friendly sentences."))
        cut, exact, ended = engine.generate(
            [replace(asked(), max_new_tokens=limit) for limit in (whole - 1, whole, whole + 1)]
        )
        assert [len(cut.token_ids), len(exact.token_ids), len(ended.token_ids)] == [whole - 1, whole, whole]
        assert [cut.finish_reason, exact.finish_reason, ended.finish_reason] == ["length", "length", "stop"]
        assert [r.usage.completion_tokens for r in (cut, exact, ended)] == [whole - 1, whole, whole + 1]

    def test_the_context_ends_an_answer(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        follow(monkeypatch, engine, " kite" * 100)
        request = of_length(engine, 512 - 5)
        (result,) = engine.generate([replace(request, max_new_tokens=50)])
        assert (result.finish_reason, result.text) == ("length", " kite" * 5)


def of_length(engine: TransformersEngine, tokens: int) -> EngineRequest:
    """A request of exactly this many tokens."""
    bare = engine.count_tokens(replace(asked(), messages=(Message("user", ""),)))
    request = replace(asked(), messages=(Message("user", " kite" * (tokens - bare)),))
    assert engine.count_tokens(request) == tokens
    return request


class TestFaults:
    def test_over_long_prompts_are_refused_with_their_length(self, engine: TransformersEngine) -> None:
        limit = engine.capabilities.max_context
        assert limit == 512
        fits, exact, over = (of_length(engine, tokens) for tokens in (limit - 1, limit, limit + 3))
        good, full, long, also_good = engine.generate([fits, exact, over, asked()])
        assert (good.error, also_good.error) == (None, None)
        for result, tokens in ((full, limit), (long, limit + 3)):
            assert (result.finish_reason, result.error_code) == ("error", "input_too_long")
            assert f"takes {tokens} tokens, the model reads {limit}" in (result.error or "")
        _, bad = engine.score([asked(), over], SLOTS, CANDIDATES)
        assert (bad.error_code, bad.logprobs, bad.chosen) == ("input_too_long", (), ())

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_weights_give_errors_and_no_labels(self, value: float, tiny_model: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        set_weight(folder, "layers.1.mlp.down_proj", value)
        engine = TransformersEngine.load(str(folder), dtype="fp32")
        begun = asked(forced_prefix=FAST_PREFIX)
        for result in engine.generate([asked(), replace(begun, label_fields=FIELDS, candidates=CANDIDATES)]):
            assert (result.finish_reason, result.error_code, result.label_logprobs) == ("error", "engine", {})
            assert result.text == ""
            assert result.error == "the model returned NaN or infinity: load it with dtype fp32, or download it again"
        for score in engine.score([begun, begun], SLOTS, CANDIDATES):
            assert (score.logprobs, score.chosen, score.error_code) == ((), (), "engine")
            assert (score.error or "").startswith("the model returned NaN or infinity")

    @pytest.mark.parametrize("fault", [RuntimeError, MemoryError, IndexError, ValueError, torch.OutOfMemoryError])
    def test_a_fault_harms_only_the_request_that_causes_it(
        self, fault: type[Exception], engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = timeless(engine.generate([asked("One."), asked("Three.")]))
        poison = len(engine.inputs.encode(asked("Two " * 20).messages).ids)
        real = Decoder.prefill

        def prefill(decoder: Decoder, rows: Sequence[Any], *rest: Any) -> Any:
            if any(len(row.ids) == poison for row in rows):
                raise fault("secret words of the user")
            return real(decoder, rows, *rest)

        monkeypatch.setattr(Decoder, "prefill", prefill)
        first, second, third = engine.generate([asked("One."), asked("Two " * 20), asked("Three.")])
        assert timeless([first, third]) == expected
        assert (second.finish_reason, second.error_code) == ("error", "engine")
        assert fault.__name__ in (second.error or "")
        assert "secret" not in (second.error or "")

    def test_a_fault_while_reading_a_request_is_its_own(
        self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def encode(*_: Any) -> Any:
            raise TypeError("the tokenizer stumbled")

        monkeypatch.setattr(QwenInputs, "encode", encode)
        (result,) = engine.generate([asked()])
        assert result.error_code == "engine"

    def test_interrupts_pass(self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        def prefill(*_: Any) -> Any:
            raise KeyboardInterrupt

        monkeypatch.setattr(Decoder, "prefill", prefill)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([asked()])
        monkeypatch.undo()
        assert engine.generate([asked()])[0].error is None

    def test_equal_candidates_are_an_error(self, engine: TransformersEngine) -> None:
        (score,) = engine.score([asked(forced_prefix=FAST_PREFIX)], SLOTS, (" kite", " kite"))
        assert score.error
        assert score.logprobs == ()

    def test_images_of_other_budgets_share_a_call(self, engine: TransformersEngine) -> None:
        small, large = PixelBudget(28 * 28, 56 * 56), PixelBudget(112 * 112, 140 * 140)
        shown = Exchange("x", (image(300, 300),))
        requests = [request_for(shown, pixels=pixels) for pixels in (small, None, large, small)]
        results = engine.generate([*requests, mismatched()])
        tokens = [result.usage.prompt_tokens for result in results]
        assert tokens[0] == tokens[3] < tokens[1] < tokens[2]
        assert results[0].token_ids == results[3].token_ids == engine.generate(requests[:1])[0].token_ids

    def test_a_text_only_placeholder_is_no_image(self, engine: TransformersEngine) -> None:
        hostile = request_for(Exchange(f"{IMAGE} <|image_pad|> <|vision_start|>"))
        assert engine.generate([hostile])[0].error is None

    def test_torchvision_is_not_needed(self, engine: TransformersEngine) -> None:
        engine.generate(mixed())
        assert "torchvision" not in sys.modules

    def test_threads_do_not_disturb_each_other(self, engine: TransformersEngine) -> None:
        from concurrent.futures import ThreadPoolExecutor

        expected = [result.token_ids for result in engine.generate(mixed())]
        with ThreadPoolExecutor(3) as pool:
            results: list[EngineResult] = [
                result for answer in pool.map(lambda r: engine.generate([r]), mixed() * 2) for result in answer
            ]
        assert [result.token_ids for result in results] == expected * 2


class TestFirstDifference:
    def test_words_that_differ_at_once(self, engine: TransformersEngine) -> None:
        common, ids = Vocabulary(engine.inputs).first_difference(CANDIDATES)
        assert (common, len(set(ids))) == ([], 2)

    def test_words_that_share_a_head(self, engine: TransformersEngine) -> None:
        common, ids = Vocabulary(engine.inputs).first_difference(WITH_COMMON_HEAD)
        encoded = [engine.inputs.tokens(word) for word in WITH_COMMON_HEAD]
        assert len(common) >= 1
        assert [tokens[: len(common)] for tokens in encoded] == [common] * 2
        assert [tokens[len(common)] for tokens in encoded] == ids

    @pytest.mark.parametrize("words", [(" kite", " kite"), (" kite", " kite kite"), (" undone", " unlike", " bread")])
    def test_words_that_never_differ_at_one_token_are_refused(
        self, words: tuple[str, ...], engine: TransformersEngine
    ) -> None:
        with pytest.raises(InputError, match="do not differ"):
            Vocabulary(engine.inputs).first_difference(words)
