"""Compiled elementwise functions: the eager model's numbers, compiled once, used in training only."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch._dynamo.utils import counters

from llamatrain.config import ParallelConfig
from llamatrain.config.parallel import RECOMPUTE
from llamatrain.config.resume import differences
from llamatrain.errors import ConfigError
from llamatrain.model import compilation
from llamatrain.model.compilation import apply_compile, check_compile, compiled_functions, resolve_compile
from llamatrain.model.llama import KVCache, Llama
from llamatrain.parallel.recompute import apply_recompute
from llamatrain.session import started_with
from tests.small_run import assert_same_run, metrics, small_config, train_in_process
from tests.test_block_backward import DOCUMENTS, logits_and_gradients
from tests.test_model import relative, some_tokens, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# weights not so large that a rounding in the first layer decides about the last
SHAPE: dict[str, Any] = {"n_kv_heads": 2, "n_layers": 3, "init_std": 0.1}


def with_recompute(model: Llama, mode: str) -> Llama:
    for block in model.layers.values():
        block.training_forward = None  # type: ignore[assignment]
    apply_recompute(model, ParallelConfig(recompute=mode))
    return model


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype_and_compiled(request: pytest.FixtureRequest) -> tuple[torch.dtype, Llama]:
    model = tiny(request.param, **SHAPE)
    apply_compile(model)
    return request.param, model


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_gradients_are_those_of_the_eager_model(dtype_and_compiled: tuple[torch.dtype, Llama], mode: str) -> None:
    dtype, model = dtype_and_compiled
    plain_logits, plain = logits_and_gradients(tiny(dtype, **SHAPE), DOCUMENTS)
    model.zero_grad()
    logits, found = logits_and_gradients(with_recompute(model, mode), DOCUMENTS)
    assert logits.dtype == dtype
    if dtype == torch.float32:
        assert relative(logits - plain_logits, plain_logits) <= 1e-5
        for name, gradient in plain.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        return
    exact_logits, exact = logits_and_gradients(tiny(**SHAPE), DOCUMENTS)
    assert relative(logits - exact_logits, exact_logits) <= 1.1 * relative(plain_logits - exact_logits, exact_logits)
    for name, gradient in exact.items():
        noise = relative(plain[name] - gradient, gradient)  # of the eager model in bf16
        assert relative(found[name] - gradient, gradient) <= 1.2 * noise, name


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# rms_norm, rope, swiglu; by hand also rms_norm_and_rstd, rms_norm_again and three backwards
@pytest.mark.parametrize(("mode", "functions"), [("none", 3), ("selective", 3), ("full", 3), ("block_backward", 8)])
def test_a_function_is_compiled_once_for_all_layers_steps_and_documents(mode: str, functions: int) -> None:
    model = with_recompute(tiny(**SHAPE), mode)
    apply_compile(model)
    counters.clear()
    for documents in (None, [120], [40, 80], [5, 35, 41, 39], [119, 1]):
        logits_and_gradients(model, documents)
        assert graphs() == functions
    assert not counters["graph_break"]


def test_the_loss_is_that_of_the_eager_model_tied_or_not() -> None:
    for tied in (False, True):
        plain, model = tiny(tied_embeddings=tied, **SHAPE), tiny(tied_embeddings=tied, **SHAPE)
        apply_compile(model)
        tokens, targets = some_tokens(2, 24), some_tokens(2, 24, seed=1)
        targets[0, :5] = -100
        counters.clear()
        losses = [each(tokens, targets=targets) for each in (plain, model)]
        assert graphs() == 4  # rms_norm, rope, swiglu, cross_entropy
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
        for loss in losses:
            loss.backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert (q.grad - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name


def test_that_the_first_step_will_take_long_is_told_before_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        apply_compile(tiny(**SHAPE))
    assert caplog.messages == ["compiling what is elementwise: the first step takes up to a few minutes longer"]


def test_only_training_is_compiled() -> None:
    model, plain = tiny(**SHAPE), tiny(**SHAPE)
    apply_compile(model)
    logits_and_gradients(model)
    counters.clear()
    with torch.no_grad():
        for batch in (1, 2, 3):  # a validation's last batch has any size
            tokens = some_tokens(batch, 40)
            assert torch.equal(model(tokens), plain(tokens))
    with torch.inference_mode():
        cache = KVCache(model.config, batch=1, max_len=8, dtype=torch.float32, device=CPU)
        tokens = some_tokens(1, 8)
        pieces = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:6], cache=cache)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), plain(tokens[:, :6]))
    assert graphs() == 0


def test_another_shape_is_compiled_for_itself() -> None:
    model = tiny(**SHAPE)
    apply_compile(model)
    for batch in (3, 2):
        model.zero_grad()
        plain = tiny(**SHAPE)
        for each in (model, plain):
            each(some_tokens(batch, 16)).pow(2).sum().backward()
        for name, parameter in plain.named_parameters():
            found, gradient = model.get_parameter(name).grad, parameter.grad
            assert found is not None and gradient is not None
            assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_parameters_keep_their_names() -> None:
    plain, model = tiny(), tiny()
    apply_compile(model)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_deterministic_run_has_no_kernels_chosen_by_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(options["options"]) or function)
    for deterministic in (True, False):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda chosen=deterministic: chosen)
        compiled_functions()
        assert given.pop() == {"deterministic": deterministic}


# The choice


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.compile as it is on a machine without one, by what torch 2.11 and 2.13 say there."""

    def failing(function: Any, **options: Any) -> Any:
        def call(*inputs: Any) -> Any:
            raise RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nmore")

        return call

    compilation._failure.cache_clear()
    monkeypatch.setattr(torch, "compile", failing)
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: real(*size, **options))  # no CUDA here
    yield
    compilation._failure.cache_clear()


def test_null_is_no_on_the_cpu_and_what_is_said_is_done() -> None:
    assert resolve_compile(None, CPU) is False
    for chosen in (True, False):
        assert resolve_compile(chosen, CPU) is resolve_compile(chosen, CUDA) is chosen


def test_null_is_yes_on_cuda_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_failure", lambda device: None)
    assert resolve_compile(None, CUDA) is True


def test_null_on_cuda_without_a_compiler_is_no_and_told(no_compiler: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert resolve_compile(None, CUDA) is False
    assert caplog.messages == [
        "not compiled: InvalidCxxCompiler: No working C++ compiler found; train.compile=true would insist"
    ]


@pytest.mark.parametrize(("device", "needed"), [(CPU, r"a C\+\+ compiler \(g\+\+"), (CUDA, "Triton, a C compiler")])
def test_without_a_compiler_true_is_refused_in_one_line(no_compiler: None, device: torch.device, needed: str) -> None:
    message = (
        rf"^train.compile=true cannot run: InvalidCxxCompiler: No .* found; install {needed}.* train.compile=false$"
    )
    with pytest.raises(ConfigError, match=message):
        check_compile(device)


def test_a_run_that_cannot_compile_ends_before_it_opens_its_data(no_compiler: None, tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", {"text": tmp_path / "nowhere"}, train={"compile": True})
    with pytest.raises(ConfigError, match=r"train\.compile=true cannot run: Invalid"):
        train_in_process(config)


# A run


def test_a_compiled_run_resumes_to_the_bit_and_stays_compiled(sources: dict[str, Path], tmp_path: Path) -> None:
    train: dict[str, Any] = {"compile": True, "steps": 8}
    counters.clear()
    train_in_process(small_config(tmp_path / "whole", sources, train=train))
    assert graphs() >= 3
    train_in_process(small_config(tmp_path / "broken", sources, train={**train, "stop_after_step": 4}))
    train_in_process(small_config(tmp_path / "broken", sources, train={**train, "compile": None}))
    assert_same_run(tmp_path / "whole", tmp_path / "broken", step=8)
    started = started_with(tmp_path / "broken" / "config.yaml")
    assert started.train.compile is True
    eager = small_config(tmp_path / "broken", sources, train={**train, "compile": False})
    assert differences(eager, started)["train.compile"] == (True, False)
    plain = small_config(tmp_path / "eager", sources, train={"steps": 8})
    train_in_process(plain)
    assert yaml.safe_load((tmp_path / "eager" / "config.yaml").read_text())["train"]["compile"] is False
    losses = [[r["train/loss"] for r in metrics(tmp_path / run) if "train/loss" in r] for run in ("whole", "eager")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
