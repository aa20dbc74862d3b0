"""AdamW on fp32 copies of weights that are held in bf16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from guardreasoner_vl.training.master_adamw import MasterAdamW

if TYPE_CHECKING:
    from pathlib import Path

BETAS = (0.9, 0.99)


def model(dtype: torch.dtype) -> torch.nn.Sequential:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return network.to(torch.bfloat16).to(dtype)  # the same numbers in both


def backward(network: torch.nn.Sequential, seed: int) -> None:
    """Gradients that are the same numbers in both precisions."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        parameter.grad = gradient.to(parameter.dtype)


def stock(network: torch.nn.Sequential, decay: float) -> torch.optim.AdamW:
    parameters = list(network.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=BETAS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_adamw_in_fp32(dtype: torch.dtype) -> None:
    trained, theirs = model(dtype), model(torch.float32)
    optimizer, reference = MasterAdamW(trained.parameters(), 1e-2, BETAS, 0.1), stock(theirs, 0.1)
    for seed in range(20):
        backward(trained, seed)
        backward(theirs, seed)
        optimizer.step()
        reference.step()
    for actual, other in zip(trained.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(actual, other.to(dtype), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    expected = [parameter for group in reference.param_groups for parameter in group["params"]]
    for actual, other in zip(masters, expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, other.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_small_updates_add_up() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], 1e-5, BETAS, 0.0)
    plain = torch.nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    reference = torch.optim.AdamW([plain], lr=1e-5, betas=BETAS, weight_decay=0.0)
    for _ in range(1000):
        weight.grad = plain.grad = torch.ones(1, 1, dtype=torch.bfloat16)
        optimizer.step()
        reference.step()
    assert plain.item() == 1.0  # 1 - 1e-5 rounds back to 1 in bf16, every time
    assert weight.item() == pytest.approx(0.99, abs=4e-3)


def test_decay_is_for_matrices_only() -> None:
    network = model(torch.float32)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = MasterAdamW(network.parameters(), 1e-2, BETAS, 0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), old * (1 - 1e-2 * 0.5) if old.dim() > 1 else old)


def test_without_a_gradient_nothing_moves() -> None:
    network = model(torch.bfloat16)
    frozen = network[0].weight
    network[2].weight.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = MasterAdamW(network.parameters(), 1e-2, BETAS, 0.5)
    backward(network, 0)
    frozen.grad = None
    optimizer.step()
    moved = [not torch.equal(own, old) for own, old in zip(network.parameters(), before, strict=True)]
    assert moved == [False, True, False, True]


def test_zero_grad_clears_the_models_gradients() -> None:
    network = model(torch.bfloat16)
    optimizer = MasterAdamW(network.parameters(), 1e-2, BETAS, 0.0)
    backward(network, 0)
    optimizer.step()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in network.parameters())
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer.step()
    assert all(torch.equal(own, old) for own, old in zip(network.parameters(), before, strict=True))


def test_the_scheduler_moves_the_rate() -> None:
    network = model(torch.float32)
    optimizer = MasterAdamW(network.parameters(), 1.0, BETAS, 0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_saved_state_continues_to_the_bit(tmp_path: Path) -> None:
    straight = model(torch.bfloat16)
    optimizer = MasterAdamW(straight.parameters(), 1e-3, BETAS, 0.1)
    for seed in range(10):
        backward(straight, seed)
        optimizer.step()
        if seed == 4:
            torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
            torch.save(straight.state_dict(), tmp_path / "model.pt")
    resumed = model(torch.bfloat16)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    again = MasterAdamW(resumed.parameters(), 1e-3, BETAS, 0.1)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for seed in range(5, 10):
        backward(resumed, seed)
        again.step()
    for actual, other in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(actual, other)
    for actual, other in zip(again.state_dict()["masters"], optimizer.state_dict()["masters"], strict=True):
        assert torch.equal(actual, other)


def test_a_saved_state_is_a_copy() -> None:
    network = model(torch.bfloat16)
    optimizer = MasterAdamW(network.parameters(), 1e-1, BETAS, 0.0)
    state = optimizer.state_dict()
    before = [master.clone() for master in state["masters"]]
    backward(network, 0)
    optimizer.step()
    assert all(torch.equal(own, old) for own, old in zip(state["masters"], before, strict=True))


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = MasterAdamW(model(torch.bfloat16).parameters(), 1e-3, BETAS, 0.1)
    smaller = MasterAdamW(torch.nn.Linear(4, 8).parameters(), 1e-3, BETAS, 0.1)
    with pytest.raises(ValueError, match="argument"):
        optimizer.load_state_dict(smaller.state_dict())
