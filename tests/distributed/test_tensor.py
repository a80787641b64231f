"""Ranks that share layers against one that has them whole."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate

from llamatrain.config.parallel import ParallelConfig
from llamatrain.distributed import World
from llamatrain.model import sharing
from llamatrain.model.init import init_weights
from llamatrain.model.llama import Llama
from llamatrain.model.sharing import TensorParallel
from llamatrain.parallel.recompute import apply_recompute
from llamatrain.parallel.tensor import share_layers
from llamatrain.verification.course import whole
from tests.distributed.test_context import DOCUMENTS, loss_and_gradients
from tests.ranks import on_ranks
from tests.test_model import TINY, tiny

RECOMPUTE = ("none", "block_backward", "selective", "full")
EVEN = {"vocab_size": TINY.vocab_size + TINY.vocab_size % 2}
CASES: dict[str, Any] = {
    "plain": (EVEN, None),
    "documents, grouped": ({**EVEN, "n_kv_heads": 2}, DOCUMENTS),
    "tied": ({**EVEN, "tied_embeddings": True}, DOCUMENTS),
}
Results = dict[tuple[str, str], tuple[Tensor, dict[str, Tensor]]]  # by case and choice of recompute


def shared(world: World) -> Results:
    """What comes of all ranks sharing each layer; gradients whole."""
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",))
    results = {}
    for case, recompute in product(CASES, RECOMPUTE):
        plain = tiny(**CASES[case][0])
        with torch.device("meta"):
            model = Llama(plain.config)
        share_layers(model, mesh)
        apply_recompute(model, ParallelConfig(recompute=recompute))
        model.to_empty(device="cpu")
        model.rebuild_rope_tables()
        init_weights(model, plain.config, seed=0)
        loss, gradients = loss_and_gradients(model, CASES[case][1])
        results[case, recompute] = loss, {name: whole(gradient, world) for name, gradient in gradients.items()}
    return results


def alone(case: str) -> tuple[Tensor, dict[str, Tensor]]:
    model = tiny(**CASES[case][0])
    init_weights(model, model.config, seed=0)
    return loss_and_gradients(model, CASES[case][1])


def check(results: Results) -> None:
    assert len(results) == len(CASES) * len(RECOMPUTE)
    expected = {case: alone(case) for case in CASES}
    for (case, recompute), (loss, gradients) in results.items():
        torch.testing.assert_close(loss, expected[case][0], rtol=1e-6, atol=0.0)
        assert gradients.keys() == expected[case][1].keys()
        for name, gradient in expected[case][1].items():
            error = (gradients[name] - gradient).abs().max()
            assert error <= 1e-5 * gradient.abs().max(), (case, recompute, name)


def test_loss_and_gradients_are_those_of_whole_layers() -> None:
    for results in on_ranks(2, shared):
        check(results)


def without_sums(world: World) -> Results:
    """The gradients of weights that all ranks have whole are taken for whole themselves."""
    sharing.Partial = Replicate
    return shared(world)


def test_gradients_of_norms_that_are_not_added_up_are_noticed() -> None:
    (results, _) = on_ranks(2, without_sums)
    with pytest.raises(AssertionError, match="norm"):
        check(results)


def exchanged(world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Of x = rank + token: all tokens, this rank's tokens of the sum, and the gradient of the gathered."""
    ranks = TensorParallel(torch.distributed.group.WORLD, rank=world.rank, size=world.size)  # type: ignore[arg-type]
    own = torch.full((2, 3, 1), 10.0 * world.rank, requires_grad=True)
    everything = ranks.gather(own + torch.arange(3.0)[None, :, None])
    summed = ranks.scatter(everything * (world.rank + 1))
    (everything * torch.arange(6.0)[None, :, None]).sum().backward()
    assert own.grad is not None
    return everything.detach()[:, :, 0], summed.detach()[:, :, 0], own.grad[0, :, 0]


def test_tokens_are_gathered_in_order_and_sums_scattered_to_their_tokens() -> None:
    for rank, (everything, summed, gradient) in enumerate(on_ranks(2, exchanged)):
        assert everything.tolist() == [[0, 1, 2, 10, 11, 12]] * 2
        assert summed.tolist() == [[3 * n for n in ([0, 1, 2], [10, 11, 12])[rank]]] * 2
        assert gradient.tolist() == [2 * n for n in ([0, 1, 2], [3, 4, 5])[rank]]
