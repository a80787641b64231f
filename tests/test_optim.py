"""The optimizer's groups and state, and the schedule."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamatrain.config import ModelConfig, OptimConfig
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.optim.adamw import build_adamw, moment_tensors, set_step_count, step_count
from llamatrain.optim.schedule import learning_rate

PAPER = OptimConfig()
SMALL = ModelConfig(dim=16, n_layers=2, n_heads=2, vocab_size=32, max_seq_len=8, ffn_multiple_of=8, attention="sdpa")


def test_the_schedule_passes_through_the_papers_points() -> None:
    rate = [learning_rate(step, PAPER, schedule_steps=10_000) for step in range(1, 12_001)]
    assert rate[0] == pytest.approx(3e-4 / 2000)
    assert rate[999] == pytest.approx(1.5e-4)
    assert rate[1999] == 3e-4 == max(rate)
    assert rate[5999] == pytest.approx((3e-4 + 3e-5) / 2)
    assert rate[9999] == rate[-1] == pytest.approx(3e-5)


@given(step=st.integers(1, 5000), warmup=st.integers(0, 500), length=st.integers(501, 4000))
def test_the_rate_rises_then_falls_and_stays_in_bounds(step: int, warmup: int, length: int) -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=warmup, min_lr_ratio=0.1)
    now, then = (learning_rate(s, optim, schedule_steps=length) for s in (step, step + 1))
    assert 0 < now <= 1
    assert then >= now if step < warmup else then <= now + 1e-12
    assert now >= 0.1 or step < warmup


def model_and_optimizer(optim: OptimConfig) -> tuple[Llama, torch.optim.AdamW]:
    model = Llama(SMALL)
    init_weights(model, SMALL, seed=0)
    return model, build_adamw(model.named_parameters(), optim)


@pytest.mark.parametrize(("decay", "norms_decay"), [("matrices", False), ("all", True)])
def test_decay_spares_the_norms_unless_told_otherwise(decay: str, norms_decay: bool) -> None:
    model, optimizer = model_and_optimizer(OptimConfig(decay=decay, weight_decay=0.5, lr=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = torch.allclose(parameter, before[name] * (1 - 0.1 * 0.5)) and not torch.equal(parameter, before[name])
        assert shrunk == ("norm" not in name or norms_decay), name


def test_the_update_is_that_of_the_formula() -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), two steps by hand, against the fused kernel."""
    optim = OptimConfig(lr=1e-2)
    model, optimizer = model_and_optimizer(optim)
    name, weight = next(iter(model.named_parameters()))
    expected = weight.detach().double().clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3 * step)
        g = torch.full_like(expected, 0.3 * step)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected -= optim.lr * optim.weight_decay * expected
        expected -= optim.lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + optim.eps)
        optimizer.step()
    assert torch.allclose(weight.double(), expected, rtol=1e-5, atol=1e-7)
    assert step_count(optimizer) == 2
    moments = moment_tensors(optimizer, model.named_parameters())
    assert torch.allclose(moments[f"{name}.exp_avg"].double(), m, rtol=1e-5)


def test_state_exists_before_the_first_step_and_can_be_filled() -> None:
    model, optimizer = model_and_optimizer(PAPER)
    moments = moment_tensors(optimizer, model.named_parameters())
    assert len(moments) == 2 * len(list(model.parameters()))
    assert all(not moment.any() for moment in moments.values())
    set_step_count(optimizer, 7)
    assert step_count(optimizer) == 7
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert step_count(optimizer) == 8
    moment = next(iter(moments.values()))
    assert math.isclose(moment.flatten()[0].item(), 0.1, rel_tol=1e-5)
