"""The verification itself: it passes what is right, and fails when a mechanism is broken on purpose."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llamatrain.checkpoint import store
from llamatrain.config.parallel import ParallelConfig
from llamatrain.data.loader import Batch
from llamatrain.distributed import World
from llamatrain.parallel import fsdp
from llamatrain.trainer import Trainer
from llamatrain.verification import order
from llamatrain.verification.cases import VOCAB_SIZE, Case, all_cases
from llamatrain.verification.corpus import write_corpus
from llamatrain.verification.course import Before
from llamatrain.verification.runner import Result, Runner
from tests.ranks import on_ranks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verify") / "corpus"
    write_corpus(directory, vocab_size=VOCAB_SIZE)
    return directory


def outcome(world: World, case: Case, workspace: Path, corpus: Path, before: Before | None = None) -> Result:
    (result,) = Runner(world, workspace, corpus, before=before).run([case], lambda result: None)
    return result


def test_a_layout_that_is_right_passes(corpus: Path, tmp_path: Path) -> None:
    for result in on_ranks(2, outcome, Case(2, {"forward_prefetch": 1}), tmp_path, corpus):
        assert result.failures == []
        assert result.differences is not None
        assert 0 < result.differences.loss < 1e-5


def averaged(trainer: Trainer, batch: Batch) -> None:
    for unit in fsdp.units(trainer.model):
        unit.set_gradient_divide_factor(2.0)


def unreduced(trainer: Trainer, batch: Batch) -> None:
    """Between the copies of the weights no gradient is added up."""
    fsdp.begin_micro_batch = lambda model, settings, last: model.set_requires_all_reduce(False)


def unsynchronised(trainer: Trainer, batch: Batch) -> None:
    if trainer.step == 0 and trainer.world.rank == 1:
        with torch.no_grad():
            for parameter in trainer.parameters.values():
                parameter.to_local().add_(1e-3)


def without_prefetch(trainer: Trainer, batch: Batch) -> None:
    for unit in fsdp.units(trainer.model):
        unit.set_modules_to_forward_prefetch([])


def spoiled_checkpoint(trainer: Trainer, batch: Batch) -> None:
    def write(tensors: dict, directory: Path, original=store.save_file) -> None:
        original({name: tensor + (tensor.ndim > 1) for name, tensor in tensors.items()}, directory)

    if trainer.step == 0:
        store.save_file = write


@pytest.mark.parametrize(
    ("fault", "parallel", "told"),
    [
        (averaged, {}, "gradient norms differ by 5.0e-01"),
        (unreduced, {"dp_replicate": 2}, "the first gradient of"),
        (unsynchronised, {}, "losses differ"),
        (without_prefetch, {"forward_prefetch": 1}, "forward: layers.1 is not gathered while layers.0 computes"),
        (spoiled_checkpoint, {}, "its checkpoint, read whole, differs"),
    ],
)
def test_a_broken_mechanism_fails(fault: Before, parallel: dict, told: str, corpus: Path, tmp_path: Path) -> None:
    result = on_ranks(2, outcome, Case(2, parallel), tmp_path, corpus, fault)[0]
    assert any(failure.startswith(told) for failure in result.failures), result.failures


def test_the_order_of_collectives_is_read_from_what_happened() -> None:
    forward = ["all_gather (layers.0)", "all_gather (layers.1)", "post_forward (layers.0)", "post_forward (layers.1)"]
    backward = [
        "pre_backward (layers.1)", "all_gather (layers.0)", "post_backward_accumulate (layers.1)",
        "post_backward_reduce (layers.1)", "pre_backward (layers.0)", "post_backward_accumulate (layers.0)",
    ]  # fmt: skip
    ahead = ParallelConfig(forward_prefetch=1)
    assert order.violations(forward + backward, ahead, layers=2, gathers=True) == []
    late = [forward[0], forward[2], forward[1], forward[3]]
    assert len(order.violations(late + backward, ahead, layers=2, gathers=True)) == 1
    assert order.violations(late + backward, ParallelConfig(), layers=2, gathers=True) == []
    kept_back = [event for event in backward if "reduce" not in event]
    assert len(order.violations(forward + kept_back, ahead, layers=2, gathers=True)) == 1


def test_a_torch_that_shows_nothing_fails_the_order() -> None:
    assert "shows nothing" in order.violations([], ParallelConfig(), layers=2, gathers=True)[0]


def test_cases_of_a_suite_have_names_of_their_own() -> None:
    for ranks in (1, 2, 4, 8, 16):
        names = [case.name for case in all_cases(ranks, ranks_per_node=8)]
        assert len(set(names)) == len(names)


@pytest.mark.slow
def test_the_command_prints_a_table_and_its_exit_status_says_whether_all_passed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llamatrain.verify", "only=forward_prefetch=1", f"workspace={tmp_path}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 layouts to try, by number of processes: 0 on 1, 1 on 2, 1 on 4\n")
    assert done.stdout.count("ok  (1 of 1, 0 s left)\n") == 2
    assert "all 2 layouts give the model of one process" in done.stdout
    assert [result["ranks"] for n in (2, 4) for result in json.loads((tmp_path / f"results-{n}.json").read_text())] == [
        2,
        4,
    ]
    nothing = subprocess.run(
        [*command[:3], "only=nonsense", f"workspace={tmp_path}"], cwd=REPOSITORY, capture_output=True
    )
    assert nothing.returncode == 1
