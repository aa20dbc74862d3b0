"""The update: passes of any size give one gradient, leaving out what has no signal is exact, clipping follows B_s."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from guardreasoner_vl.corpus.store import read_corpus
from guardreasoner_vl.engines.qwen import QwenInputs
from guardreasoner_vl.errors import EngineError
from guardreasoner_vl.mining.rollout_io import rollout_request
from guardreasoner_vl.recipe import GrpoSection, RolloutSection
from guardreasoner_vl.rl.loss import clipped_loss
from guardreasoner_vl.rl.reward import Reward
from guardreasoner_vl.rl.shared_prefix import Branch, Tree, completion, log_probabilities, pack, use_shared_prefix
from guardreasoner_vl.training.grpo import update as grpo_update
from guardreasoner_vl.training.grpo.ranks import DistributedContext
from guardreasoner_vl.training.grpo.rollouts import Rollout, RolloutGroup
from guardreasoner_vl.training.grpo.update import Passes, PolicyNetwork, accumulate, old_log_probabilities
from guardreasoner_vl.training.model_folder import load_for_training
from tests.training.grpo import toy_grpo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from guardreasoner_vl.training.grpo.update import Pass, UpdateFigures
    from guardreasoner_vl.types import Sample

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
SECTION = GrpoSection(group_size=4, precision="fp32", temperature=1.2)
TOTAL = 24  # N counts more than what stands here
NONE = Reward(0, 0, 0, 0, 0)
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    network = load_for_training(tiny_model, "fp32")
    use_shared_prefix(network)
    return network.train()


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, inputs: QwenInputs) -> list[RolloutGroup]:
    """One of every modality and two more, completions of unequal lengths; the second and the last have no signal."""
    rows = list(read_corpus(toy_grpo.write_rows(tmp_path_factory.mktemp("rows"), 8)))
    chosen = [rows[place] for place in (0, 1, 4, 6, 5)]
    assert [row.modality for row in chosen] == ["text", "text", "image", "text-image", "image"]
    all_signal = [group(row, inputs, number) for number, row in enumerate(chosen)]
    return [replace(one, advantages=(0.0,) * 4) if number in (1, 4) else one for number, one in enumerate(all_signal)]


def group(sample: Sample, inputs: QwenInputs, seed: int) -> RolloutGroup:
    rng = np.random.default_rng(seed)
    request = rollout_request(sample)
    answers = [tuple(int(token) for token in rng.integers(20, 250, size)) for size in (7, 1, 12, 5)]
    advantages = tuple(float(value) for value in rng.normal(size=4))
    prompt = inputs.encode(request.messages, request.images)
    return RolloutGroup(sample, prompt, request.images, tuple(Rollout(ids, NONE) for ids in answers), advantages)


def passes_of(groups: Sequence[RolloutGroup], inputs: QwenInputs, budget: int = 16_384) -> list[Pass]:
    return Passes(inputs, SECTION.model_copy(update={"pass_tokens": budget}), CPU).of(groups, TOTAL)


def gradients(
    model: Any, passes: Sequence[Pass], old: Any = None, bound: float = 0.2
) -> tuple[UpdateFigures, Gradients]:
    model.zero_grad()
    figures = accumulate(PolicyNetwork(model), passes, old, bound, SECTION)
    return figures, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def assert_close(first: Gradients, second: Gradients, bound: float = 1e-5) -> None:
    assert first.keys() == second.keys()
    apart = sum(float((first[name] - second[name]).square().sum()) for name in second)
    whole = sum(float(second[name].square().sum()) for name in second)
    assert (apart / whole) ** 0.5 < bound


def by_the_formula(model: Any, inputs: QwenInputs, groups: Sequence[RolloutGroup]) -> tuple[float, Gradients]:
    """-1/N sum_i A_i mean_t log p, whose gradient is that of the loss where the ratio is 1; every group for itself."""
    model.zero_grad()
    total = 0.0
    for rollout_group in groups:
        for answer, advantage in zip(rollout_group.completions, rollout_group.advantages, strict=True):
            branch = completion(answer.ids, rollout_group.prompt.next_position)
            row = pack([Tree(Branch(rollout_group.prompt.ids, rollout_group.prompt.positions), (branch,))])
            vision: dict[str, torch.Tensor] = {}
            if rollout_group.images:
                pixels = torch.from_numpy(inputs.patches([image.open() for image in rollout_group.images]))
                grids = torch.tensor([(1, *grid) for grid in rollout_group.prompt.grids])
                vision = {"pixel_values": pixels, "image_grid_thw": grids}
            logprobs = log_probabilities(model, row, vision, SECTION.temperature)
            torch.autograd.backward(-advantage * logprobs.mean() / TOTAL)
            total -= advantage / TOTAL
    return total, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_the_gradient_is_the_formula_s(model: Any, inputs: QwenInputs, groups: list[RolloutGroup]) -> None:
    """Groups without signal go through the formula here, and through no pass there."""
    loss, wanted = by_the_formula(model, inputs, groups)
    passes = passes_of(groups, inputs)
    assert sum(len(one.weights) for one in passes) == 3 * (7 + 1 + 12 + 5)
    figures, gradient = gradients(model, passes)
    assert figures.loss == pytest.approx(loss, abs=1e-6)
    assert_close(gradient, wanted)


def test_leaving_groups_out_changes_nothing(
    model: Any, inputs: QwenInputs, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, without = gradients(model, passes_of(groups, inputs))
    monkeypatch.setattr(RolloutGroup, "has_signal", property(lambda _: True))
    passes = passes_of(groups, inputs)
    assert sum(len(one.weights) for one in passes) == 5 * (7 + 1 + 12 + 5)
    figures, with_all = gradients(model, passes)
    assert figures.tokens == 5 * (7 + 1 + 12 + 5)
    assert_close(without, with_all)


@pytest.mark.parametrize(("budget", "count"), [(1, 12), (64, 7), (70, 4), (150, 2)])
def test_passes_of_any_size_give_one_gradient(
    budget: int, count: int, model: Any, inputs: QwenInputs, groups: list[RolloutGroup]
) -> None:
    whole = passes_of(groups, inputs)
    pieces = passes_of(groups, inputs, budget)
    assert (len(whole), len(pieces)) == (1, count)
    if budget >= 64:  # a completion and its prompt always go through, whatever the budget
        assert max(one.packed.ids.shape[1] for one in pieces) <= budget

    def old(passes: Sequence[Pass]) -> torch.Tensor:
        """A little off, the same for the same token of a completion wherever it stands."""
        logprobs = old_log_probabilities(PolicyNetwork(model), passes, SECTION)
        return logprobs + torch.sin(50 * logprobs) * 0.3

    figures, wanted = gradients(model, whole, old(whole))
    others, gradient = gradients(model, pieces, old(pieces))
    assert_close(gradient, wanted)
    assert others.loss == pytest.approx(figures.loss, abs=1e-6)
    assert others.tokens == figures.tokens
    assert 0 < others.clipped == figures.clipped


def test_a_blank_image_for_the_other_ranks_changes_nothing(
    model: Any, inputs: QwenInputs, groups: list[RolloutGroup]
) -> None:
    maker = Passes(inputs, SECTION, CPU, DistributedContext())
    figures, with_blank = gradients(model, maker.of(groups[:1], TOTAL))
    wanted, without = gradients(model, passes_of(groups[:1], inputs))
    tower = {name for name in with_blank if "visual" in name}
    assert tower == {name for name, _ in model.named_parameters() if "visual" in name}
    assert not any(with_blank[name].any() for name in tower)
    assert_close({name: gradient for name, gradient in with_blank.items() if name not in tower}, without)
    assert figures.tokens == wanted.tokens
    (image,) = maker.of(groups[2:3], TOTAL)  # has one of its own
    assert image.packed.ids.shape == passes_of(groups[2:3], inputs)[0].packed.ids.shape


@pytest.mark.parametrize("in_backward", [False, True])
def test_an_update_that_runs_out_of_memory_begins_again_with_half_the_tokens(
    in_backward: bool, model: Any, inputs: QwenInputs, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes have added before, and a part of the one that fails, is not counted twice."""
    old = old_log_probabilities(PolicyNetwork(model), passes_of(groups, inputs), SECTION) + 0.1
    figures, wanted = gradients(model, passes_of(groups, inputs), old)
    room, attempts = 90, []
    hooks: list[Any] = []

    def out_of_memory(*_: Any) -> None:
        for hook in hooks:
            hook.remove()
        raise torch.OutOfMemoryError("made up")

    def limited(network: Any, packed: Any, *rest: Any) -> torch.Tensor:
        logprobs = log_probabilities(network, packed, *rest)
        if packed.ids.shape[1] > room and in_backward:
            hooks.append(network.model.language_model.embed_tokens.weight.register_hook(out_of_memory))
        elif packed.ids.shape[1] > room:
            out_of_memory()
        return logprobs

    maker = Passes(inputs, SECTION.model_copy(update={"pass_tokens": 300}), CPU)

    def work() -> tuple[UpdateFigures, Gradients]:
        passes = maker.of(groups, TOTAL)
        attempts.append(max(one.packed.ids.shape[1] for one in passes))
        return gradients(model, passes, old)

    monkeypatch.setattr(grpo_update, "log_probabilities", limited)
    again, gradient = maker.within_memory(work)
    assert maker.tokens == 75
    assert attempts[0] > attempts[1] > room >= attempts[2]
    assert_close(gradient, wanted)
    assert (again.tokens, again.clipped) == (figures.tokens, figures.clipped)
    assert again.loss == pytest.approx(figures.loss, abs=1e-6)


def test_an_answer_that_does_not_fit_memory_ends_the_run_with_a_remedy(inputs: QwenInputs) -> None:
    maker = Passes(inputs, SECTION, CPU)

    def work() -> None:
        raise torch.OutOfMemoryError("made up")

    with pytest.raises(EngineError, match=r"set grpo\.gradient_checkpointing, lower grpo\.max_completion_length"):
        maker.within_memory(work)
    assert maker.tokens == 64


def test_without_signal_there_is_nothing_to_do(model: Any, inputs: QwenInputs, groups: list[RolloutGroup]) -> None:
    figures, gradient = gradients(model, passes_of([groups[1], groups[4]], inputs))
    assert (figures.loss, figures.tokens, figures.clipped) == (0, 0, 0)
    assert gradient == {}


def test_the_first_update_clips_nothing(model: Any, inputs: QwenInputs, groups: list[RolloutGroup]) -> None:
    """Its ratio is 1, so that even a bound of 0 leaves the gradient as it is."""
    passes = passes_of(groups, inputs)
    figures, wide = gradients(model, passes, None, 0.2)
    none, narrow = gradients(model, passes, None, 0.0)
    assert figures.clipped == none.clipped == 0
    assert_close(narrow, wide, 1e-7)


def test_a_narrower_bound_clips_more(model: Any, inputs: QwenInputs, groups: list[RolloutGroup]) -> None:
    passes = passes_of(groups, inputs)
    before = old_log_probabilities(PolicyNetwork(model), passes, SECTION)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        saved = [parameter.clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    counts = [gradients(model, passes, before, bound)[0].clipped for bound in (10.0, 0.5, 0.2, 0.05, 0.0)]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), saved, strict=True):
            parameter.copy_(value)
    assert counts == sorted(counts)
    assert len(set(counts)) >= 4
    assert counts[0] == 0
    unmoved = gradients(model, passes, before, 1e-4)[0]
    assert unmoved.clipped == 0


def test_clipped_tokens_by_hand() -> None:
    """Ratios 2, 2, 0.5, 0.5, 1: cut off where the advantage pulls further."""
    old = torch.zeros(5)
    logprobs = torch.tensor([2.0, 2.0, 0.5, 0.5, 1.0]).log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    result = clipped_loss(logprobs, old, advantages, torch.full((5,), 0.5), 0.2)
    assert result.clipped.tolist() == [True, False, False, True, False]
    torch.autograd.backward(result.loss)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0, 1, -0.25, 0, -0.5])  # -weight * ratio * advantage
    assert float(result.loss.detach()) == pytest.approx(-0.5 * (1.2 - 2 + 0.5 - 0.8 + 1))


def test_each_image_is_cut_into_patches_once(
    inputs: QwenInputs, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = []
    original = QwenInputs.patches

    def patches(self: QwenInputs, images: Any, budget: Any = None) -> Any:
        cut.append(len(images))
        return original(self, images, budget)

    monkeypatch.setattr(QwenInputs, "patches", patches)
    section = SECTION.model_copy(update={"pass_tokens": 1})
    maker = Passes(inputs, section, CPU)
    maker.of(groups, TOTAL)
    assert sum(cut) == 2
    maker.of(groups, TOTAL)
    assert sum(cut) == 2
    maker.forget()
    maker.of(groups, TOTAL)
    assert sum(cut) == 4


def test_autocast_is_the_recipe_s(model: Any, inputs: QwenInputs, groups: list[RolloutGroup], monkeypatch: Any) -> None:
    seen = []

    def spy(*arguments: Any) -> Any:
        seen.append(torch.is_autocast_enabled("cpu"))
        return log_probabilities(*arguments)

    monkeypatch.setattr(grpo_update, "log_probabilities", spy)
    for precision in ("fp32", "bf16", "bf16-weights"):
        section = SECTION.model_copy(update={"precision": precision})
        old_log_probabilities(PolicyNetwork(model), passes_of(groups[:1], inputs), section)
    assert seen == [False, True, False]


def test_truncated_importance_weights_multiply_the_loss(
    model: Any, inputs: QwenInputs, groups: list[RolloutGroup]
) -> None:
    """-sum_t min(p_old / p_sampler, C) A w, at the first update, where the other ratio is 1."""
    alone = groups[3]
    old = old_log_probabilities(PolicyNetwork(model), passes_of([alone], inputs), SECTION)
    difference = torch.linspace(-1.5, 1.5, len(old))  # ratios from 0.22 to 4.5
    sampled = iter((old - difference).tolist())
    completions = tuple(replace(one, logprobs=tuple(next(sampled) for _ in one.ids)) for one in alone.completions)
    passes = passes_of([replace(alone, completions=completions)], inputs)
    (part,) = passes
    loss = -(difference.exp().clamp(max=2.0) * part.advantages * part.weights).sum()
    capped = SECTION.model_copy(update={"rollouts": RolloutSection(engine="vllm-colocate", importance_cap=2.0)})
    model.zero_grad()
    figures = accumulate(PolicyNetwork(model), passes, None, 0.2, capped)
    assert figures.loss == pytest.approx(float(loss), abs=1e-6)
    assert figures.differences.tolist() == pytest.approx(difference.tolist(), abs=1e-5)
    without, _ = gradients(model, passes)
    assert without.loss == pytest.approx(-float((part.advantages * part.weights).sum()), abs=1e-6)
