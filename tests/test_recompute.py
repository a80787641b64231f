"""Every way to recompute: the gradients of the plain model, the bytes of its formula, and no product too many."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamatrain.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from llamatrain.config.build import build as build_config
from llamatrain.config.parallel import LINEARS, RECOMPUTE, SAVABLE, check_parallel
from llamatrain.config.resume import keep_auto_choices
from llamatrain.errors import ConfigError
from llamatrain.memory import activation_bytes_per_token_layer, training_memory
from llamatrain.model.llama import KVCache, Llama
from llamatrain.parallel import recompute as recompute_module
from llamatrain.parallel.recompute import apply_recompute, is_fused_attention, resolve_recompute
from tests.benchmarks.bench_recompute import (
    SHAPE,
    LiveBytes,
    build,
    kept_per_token_layer,
    peak_bytes,
    predicted_peak,
)
from tests.small_run import small_config, train_in_process
from tests.test_arithmetic import preset
from tests.test_block_backward import CHANGES, DOCUMENTS, logits_and_gradients
from tests.test_model import relative, some_tokens, tiny

aten = torch.ops.aten
SAVES: dict[str, list[str]] = {
    "default": list(SAVABLE),
    "nothing": [],
    "attention": ["attention"],
    "without attention": [name for name in SAVABLE if name != "attention"],
    "feed-forward": ["w1", "w3"],
    "some": ["wo", "wk", "w3"],
}
MODES = [("none", "default"), ("block_backward", "default"), ("full", "default"), *(("selective", s) for s in SAVES)]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def with_recompute(model: Llama, mode: str, save: str = "default") -> Llama:
    apply_recompute(model, ParallelConfig(recompute=mode, recompute_save=SAVES[save]))
    return model


# Gradients


@pytest.mark.parametrize("doc_lengths", [None, DOCUMENTS])
@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize(("mode", "save"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_plain_model(
    dtype: torch.dtype, mode: str, save: str, changes: dict[str, Any], doc_lengths: list[int] | None
) -> None:
    if dtype == torch.bfloat16:
        changes = {"init_std": 0.1, **changes}  # large weights and bf16 leave nothing of a gradient but noise
    logits, expected = logits_and_gradients(tiny(dtype, **changes), doc_lengths)
    model = with_recompute(tiny(dtype, **changes), mode, save)
    own_logits, found = logits_and_gradients(model, doc_lengths)
    assert torch.equal(own_logits, logits)
    for name, gradient in expected.items():
        if mode != "block_backward":  # the same operations, done again
            assert torch.equal(found[name], gradient), name
        elif dtype == torch.float32:
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        else:
            assert relative(found[name] - gradient, gradient) <= 0.03, name


@pytest.mark.parametrize(("mode", "save"), MODES)
def test_attention_by_the_formula_is_repeated_to_the_bit(mode: str, save: str) -> None:
    _, expected = logits_and_gradients(tiny(attention="reference"), DOCUMENTS)
    _, found = logits_and_gradients(with_recompute(tiny(attention="reference"), mode, save), DOCUMENTS)
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
        assert mode == "block_backward" or torch.equal(found[name], gradient), name


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_a_second_step_begins_like_the_first(mode: str) -> None:
    model = with_recompute(tiny(), mode)
    _, first = logits_and_gradients(model)
    first = {name: gradient.clone() for name, gradient in first.items()}
    model.zero_grad()
    _, second = logits_and_gradients(model)
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_parameters_keep_their_names_and_generation_its_way(mode: str) -> None:
    plain, model = tiny(), with_recompute(tiny(), mode)
    assert list(model.state_dict()) == list(plain.state_dict())
    tokens = some_tokens(1, 8)
    with torch.inference_mode():
        cache = KVCache(model.config, batch=1, max_len=8, dtype=torch.float32, device=tokens.device)
        assert torch.equal(model(tokens, cache=cache), plain(tokens))
        for block in model.layers.values():
            block.training_forward = None  # type: ignore[assignment]
        assert torch.equal(model(tokens), plain(tokens))


# What stays in memory


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(("mode", "save"), MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_keeps_what_its_formula_says(dtype: torch.dtype, mode: str, save: str, kv_heads: int) -> None:
    shape = replace(SHAPE, dim=256, n_kv_heads=kv_heads, max_seq_len=128)
    tokens = some_tokens(2, 128)
    kept = kept_per_token_layer(shape, mode, tokens=tokens, save=SAVES[save], dtype=dtype)
    formula = activation_bytes_per_token_layer(shape, mode, bytes_per_element=dtype.itemsize, save=SAVES[save])
    assert kept == pytest.approx(formula, rel=0.005)  # 5 % is what was asked for


@pytest.mark.parametrize(("kv_heads", "dtype"), [(8, torch.float32), (8, torch.bfloat16), (2, torch.bfloat16)])
@pytest.mark.parametrize("mode", RECOMPUTE)
def test_compiled_a_layer_keeps_what_its_formula_says(mode: str, kv_heads: int, dtype: torch.dtype) -> None:
    shape = replace(SHAPE, dim=256, n_kv_heads=kv_heads, max_seq_len=128)
    kept = kept_per_token_layer(shape, mode, tokens=some_tokens(2, 128), dtype=dtype, compiled=True)
    formula = activation_bytes_per_token_layer(shape, mode, bytes_per_element=dtype.itemsize, compiled=True)
    assert kept == pytest.approx(formula, rel=0.005)


def test_formulas_are_those_of_the_paper_and_the_literature() -> None:
    model = preset("65b")
    d, f, a = model.dim, model.ffn_width, model.n_heads
    in_bf16 = {mode: activation_bytes_per_token_layer(model, mode, bytes_per_element=2) for mode in RECOMPUTE}
    assert in_bf16["none"] == 24 * d + 8 * f + 4 * a + 8 == 373_000
    compiled = activation_bytes_per_token_layer(model, "none", bytes_per_element=2, compiled=True)
    assert compiled == 16 * d + 6 * f + 4 * a + 8
    assert in_bf16["block_backward"] == 12 * d + 4 * f + 4 * a + 8
    assert in_bf16["selective"] == 12 * d + 4 * f + 4 * a
    assert in_bf16["full"] == 2 * d


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", RECOMPUTE)
@pytest.mark.parametrize("vocab_size", [64, 4096])
def test_the_peak_of_a_step_is_the_sum_of_its_parts(vocab_size: int, mode: str, precision: str) -> None:
    shape = replace(SHAPE, dim=256, max_seq_len=256, vocab_size=vocab_size)
    model = Llama(shape, compute_dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    torch.nn.init.normal_(model.tok_embeddings.weight)
    tokens = some_tokens(4, 256) % 64
    peak = peak_bytes(with_recompute(model, mode), tokens)
    predicted = predicted_peak(shape, mode, batch=4, precision=precision)
    assert peak - 1024 <= predicted <= 1.15 * peak  # 1024: scalars and the like


# What is computed again


class Operations(TorchDispatchMode):
    """Counts operations, products under one name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.counts["product" if name in ("mm", "addmm", "addmm_") else name] += 1
        return func(*args, **(kwargs or {}))


def in_backward(mode: str, save: Sequence[str] = SAVABLE, layers: int = 3) -> Counter[str]:
    model = tiny(n_layers=layers)
    apply_recompute(model, ParallelConfig(recompute=mode, recompute_save=list(save)))
    loss = model(some_tokens(2, 16), targets=some_tokens(2, 16, seed=1))
    with Operations() as operations:
        loss.backward()
    return operations.counts


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def test_only_full_repeats_matrix_products_and_never_the_last() -> None:
    layers = 3
    least = 2 * len(LINEARS) * layers  # the head's gradients are made with the loss
    repeated = {mode: in_backward(mode, layers=layers) for mode in RECOMPUTE}
    assert {mode: counts["product"] - least for mode, counts in repeated.items()} == {
        "none": 0,
        "block_backward": 0,
        "selective": 0,
        "full": (len(LINEARS) - 1) * layers,
    }
    assert {mode: counts[ATTENTION] for mode, counts in repeated.items()} == {
        "none": 0,
        "block_backward": 0,
        "selective": 0,
        "full": layers,
    }


@pytest.mark.parametrize("left_out", SAVABLE)
def test_each_name_on_the_list_spares_its_own_product(left_out: str) -> None:
    save = [name for name in SAVABLE if name != left_out]
    whole, found = in_backward("selective"), in_backward("selective", save)
    assert found["product"] - whole["product"] == (0 if left_out == "attention" else 3)
    assert found[ATTENTION] == (3 if left_out == "attention" else 0)


class Shapes(TorchDispatchMode):
    """The shapes of all matrix products' results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.mm.default:
            self.seen.append(tuple(out.shape))
        return out


def test_the_product_repeated_is_that_of_the_layer_left_out() -> None:
    model = tiny(n_layers=1, n_kv_heads=1)
    apply_recompute(model, ParallelConfig(recompute="selective", recompute_save=[n for n in SAVABLE if n != "wk"]))
    logits = model(some_tokens(2, 16))
    with Shapes() as shapes:
        logits.sum().backward()
    tokens, kv_width = 32, 16
    assert shapes.seen.count((tokens, kv_width)) == 1  # no gradient has this shape but those of activations: x's is 64


def test_a_linear_layer_that_torch_computes_otherwise_is_not_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute_module, "MATRIX_PRODUCTS", {"aten::new"})
    with pytest.raises(RuntimeError, match=r"saw the products of \[\]"):
        with_recompute(tiny(), "selective")(some_tokens(1, 8))


def test_fused_attention_is_known_by_its_operator() -> None:
    kernels = ["flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"]
    for kernel in kernels:
        assert is_fused_attention(f"aten::_scaled_dot_product_{kernel}")
        assert hasattr(aten, f"_scaled_dot_product_{kernel}")
    for name in ("aten::_efficient_attention_forward", "aten::_flash_attention_forward", "xformers_flash::flash_fwd"):
        assert is_fused_attention(name)
    for name in (
        "aten::mm",
        "aten::bmm",
        "aten::_softmax",
        "aten::_scaled_dot_product_attention_math",
        "xformers::cat",
    ):
        assert not is_fused_attention(name)


def test_the_operator_behind_xformers_is_among_them() -> None:
    from xformers.ops import fmha

    assert is_fused_attention(fmha.cutlass.FwOp.OPERATOR.default.name())


# auto


def run_config(*, micro_batch: int = 4, seq_len: int = 2048, model: ModelConfig | None = None, **parallel: Any) -> Any:
    return RunConfig(
        model=replace(model or preset("7b"), attention="xformers"),
        data=DataConfig(seq_len=seq_len),
        train=TrainConfig(micro_batch=micro_batch, precision="bf16"),
        parallel=ParallelConfig(**parallel),
    )


def needs_gib(config: RunConfig, mode: str, ranks: int = 64) -> float:
    return sum(training_memory(config, mode, world_size=ranks).values()) / 2**30


def test_auto_takes_the_first_that_fits_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = run_config(recompute_save=["wq", "wk", "wv", "attention"])
    needs = [needs_gib(config, mode) for mode in RECOMPUTE]
    assert needs == sorted(needs, reverse=True)
    for mode, need in zip(RECOMPUTE, needs, strict=True):
        budget = replace(config, parallel=replace(config.parallel, recompute_budget_gib=need + 0.01))
        caplog.clear()
        assert resolve_recompute(budget, CPU, 64) == mode
        assert len(caplog.messages) == RECOMPUTE.index(mode) + 1  # one line for each choice tried
        parts = [float(number) for number in re.findall(r" (\d+\.\d+)(?: \+|\))", caplog.messages[-1])]
        assert sum(parts) == pytest.approx(need, abs=0.05)
        assert f"recompute={mode} needs {need:.2f} GiB of {need + 0.01:.2f}" in caplog.messages[-1]


def test_the_default_list_spares_no_more_than_block_backward() -> None:
    for size, micro_batch in itertools.product(("7b", "65b"), (1, 16)):
        config = run_config(model=preset(size), micro_batch=micro_batch)
        norms = 8 * config.model.n_layers * micro_batch * 2048 / 2**30
        assert needs_gib(config, "block_backward") <= needs_gib(config, "selective") + norms


def test_on_cuda_the_device_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = 80.0
    monkeypatch.setattr(recompute_module, "memory_total_gib", lambda device: memory)
    chosen = {n: resolve_recompute(run_config(micro_batch=n), CUDA, 64) for n in (1, 4, 8)}
    assert chosen == {1: "none", 4: "none", 8: "block_backward"}
    memory = 24.0
    assert resolve_recompute(run_config(micro_batch=4), CUDA, 64) == "full"
    with pytest.raises(
        ConfigError,
        match=r"even parallel\.recompute=full needs \d+\.\d\d GiB on each device, 90% of the device is 21\.60: lower "
        r"train\.micro_batch=32, or spread the weights over more than parallel\.dp_shard=64 ranks",
    ):
        resolve_recompute(run_config(micro_batch=32), CUDA, 64)


def test_a_choice_by_name_is_kept_unless_the_model_cannot_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recompute_module, "memory_total_gib", lambda device: 24.0)
    assert resolve_recompute(run_config(micro_batch=1, recompute="full"), CUDA, 64) == "full"
    assert "may need" not in caplog.text
    assert resolve_recompute(run_config(micro_batch=16, recompute="none"), CUDA, 64) == "none"
    assert re.search(r"recompute=none may need \d+\.\d\d GiB, 90% of the device is 21\.60", caplog.text)
    for choice in ("none", "auto"):
        with pytest.raises(
            ConfigError,
            match=r"weights, gradients and moments alone need 50\.\d\d GiB on each device, 90% of the device is "
            r"21\.60: spread the weights over at least parallel\.dp_shard=5 ranks",
        ):
            resolve_recompute(run_config(recompute=choice), CUDA, 2)


def test_on_the_cpu_auto_is_none_unless_a_budget_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute_module, "memory_total_gib", lambda device: 1000.0)
    assert resolve_recompute(run_config(micro_batch=1000), CPU, 1) == "none"
    assert resolve_recompute(run_config(recompute="full"), CPU, 1) == "full"
    with pytest.raises(ConfigError, match=r"parallel\.recompute_budget_gib allows 1\.00"):
        resolve_recompute(run_config(recompute_budget_gib=1.0), CPU, 1)


@pytest.mark.parametrize(
    ("settings", "world_size", "ranks_per_node", "held", "enough"),
    [
        ({}, 1, 1, "100.4", 5),  # 16 bytes of each of 6.7 billion parameters
        ({}, 4, 4, "100.4", 18),  # processes of one machine have its memory together
        ({"dp_replicate": 2}, 4, 4, "200.8", 18),
        ({}, 4, 1, "25.1", 5),
        ({}, 5, 1, None, None),
        ({}, 24, 4, None, None),
        ({"tp": 2}, 4, 2, "50.2", 5),
    ],
)
def test_on_the_cpu_what_the_machine_cannot_hold_is_refused(
    settings: dict[str, int], world_size: int, ranks_per_node: int, held: str | None, enough: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(recompute_module, "memory_total_gib", lambda device: 23.0)
    config = run_config(**settings)
    if held is None:
        assert resolve_recompute(config, CPU, world_size, ranks_per_node=ranks_per_node) == "none"
        return
    with pytest.raises(ConfigError, match=rf"alone need {held} GiB on each machine, which has 23\.0: .*=(\d+) ranks"):
        resolve_recompute(config, CPU, world_size, ranks_per_node=ranks_per_node)
    with pytest.raises(
        ConfigError, match=rf"at least parallel\.dp_shard={enough} ranks, {ranks_per_node} to a machine"
    ):
        resolve_recompute(config, CPU, world_size, ranks_per_node=ranks_per_node)


def test_what_is_gathered_and_kept_back_is_counted() -> None:
    plain, layer, whole = run_config(), 202_383_360, 6_738_415_616
    for settings, part, size in (
        ({}, "weights, gradients, moments", 16 * whole / 64),
        ({"dp_replicate": 8}, "weights, gradients, moments", 16 * whole / 8),
        ({"reshard_after_forward": "never"}, "weights in use", 2 * 34 * layer + 6 * 32_000 * 4096),
        ({"forward_prefetch": 3}, "weights in use", 2 * 6 * layer + 2 * 32_000 * 4096),
        ({"reduce_scatter": "last"}, "gradients kept back", (4 - 4 / 64) * whole),
        ({"reduce_scatter": "last", "reduce_dtype": "bf16"}, "gradients kept back", (2 - 4 / 64) * whole),
    ):
        parallel: dict[str, Any] = settings
        found = training_memory(run_config(**parallel), "full", world_size=64)
        assert found[part] == size
    masked = replace(plain, model=replace(plain.model, attention="sdpa"), data=DataConfig(document_mask=True))
    assert training_memory(plain, "none", world_size=64)["attention matrices"] == 0
    assert training_memory(masked, "none", world_size=64)["attention matrices"] == 32 * 4 * 2048 * 2048 * 2
    reference = replace(plain, model=replace(plain.model, attention="reference"))
    assert training_memory(reference, "full", world_size=64)["attention matrices"] == 4 * 2048 * 2048 * 32 * 4


def test_the_choice_is_written_down_and_kept(sources: dict[str, Path], tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", sources, train={"stop_after_step": 4}, evaluation={"every_steps": 0})
    full = sum(training_memory(with_precision(config), "full", world_size=1).values()) / 2**30
    train_in_process(replace(config, parallel=ParallelConfig(recompute_budget_gib=full * 1.01)))
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert "recompute: full" in written
    earlier = RunConfig(parallel=ParallelConfig(recompute="full"))
    assert keep_auto_choices(RunConfig(), earlier).parallel.recompute == "full"
    named = RunConfig(parallel=ParallelConfig(recompute="none"))
    assert keep_auto_choices(named, earlier).parallel.recompute == "none"


def with_precision(config: RunConfig) -> RunConfig:
    """As it is settled on the CPU."""
    return replace(config, train=replace(config.train, precision="fp32"), model=replace(config.model, attention="sdpa"))


def test_a_run_that_cannot_fit_ends_before_it_opens_its_data(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", {"text": tmp_path / "nowhere"})
    with pytest.raises(ConfigError, match="weights, gradients and moments alone need"):
        train_in_process(replace(config, parallel=ParallelConfig(recompute_budget_gib=1e-6)))


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recompute": "some"}, "parallel.recompute=some: choose one of auto, none, block_backward, selective, full"),
        ({"recompute_save": ["wq", "w2"]}, "names w2: backward does not read its output"),
        ({"recompute_save": ["wz"]}, "names wz: choose of wq, wk, wv, attention, wo, w1, w3"),
        ({"recompute_budget_gib": 0.0}, "parallel.recompute_budget_gib=0.0: must be above 0"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_parallel(build_config(ParallelConfig, settings))


def test_what_is_not_resolved_is_not_applied() -> None:
    with pytest.raises(ValueError, match="resolve_recompute gives one"):
        apply_recompute(tiny(), ParallelConfig())
    with pytest.raises(ValueError, match="'auto'"):
        activation_bytes_per_token_layer(preset("7b"), "auto", bytes_per_element=2)


@pytest.mark.parametrize("mode", RECOMPUTE)
def test_nothing_is_left_after_the_backward(mode: str) -> None:
    model, tokens = build(replace(SHAPE, dim=64, max_seq_len=64), mode), some_tokens(2, 64)
    with LiveBytes([*model.parameters(), *model.buffers(), tokens]) as live:
        model(tokens, targets=tokens).backward()
        gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
        assert live.now() == sum(gradient.untyped_storage().nbytes() for gradient in gradients)
