"""Which attention backend a run uses."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llamatrain.config import RunConfig
from llamatrain.config.model import ModelConfig
from llamatrain.errors import ConfigError
from llamatrain.model import attention_choice
from llamatrain.model.attention_choice import fastest, one_layer, resolve_backend

CPU = torch.device("cpu")


def config_with(attention: str = "auto", **parallel: int) -> RunConfig:
    config = RunConfig(model=ModelConfig(dim=64, n_heads=4, n_kv_heads=2, attention=attention))
    data, train = replace(config.data, seq_len=32), replace(config.train, micro_batch=3, precision="fp32")
    return replace(config, data=data, train=train, parallel=replace(config.parallel, **parallel))


def test_backend_on_the_cpu() -> None:
    assert resolve_backend(config_with("auto"), CPU) == "sdpa"
    assert resolve_backend(config_with("reference"), CPU) == "reference"
    with pytest.raises(ConfigError, match=r"no operator for the CPU; set model\.attention=sdpa"):
        resolve_backend(config_with("xformers"), CPU)


def failing() -> None:
    raise RuntimeError("no kernel for this GPU\nand much more")


def test_the_faster_wins(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []
    times = {"one": 3.0, "two": 2.0, "three": 2.5}
    candidates = {name: (lambda name=name: ran.append(name)) for name in times}

    def clock(work: Callable[[], object]) -> float:
        work()
        return times[ran[-1]]

    with caplog.at_level(logging.INFO):
        assert fastest(candidates, clock) == "two"
    assert ran == list(times)
    assert "attention: two" in caplog.text and "one 3.000 ms, two 2.000 ms" in caplog.text


def test_a_candidate_that_fails_is_told_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    assert fastest({"broken": failing, "good": lambda: None}, lambda work: (work(), 1.0)[1]) == "good"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "attention: broken cannot run here (RuntimeError: no kernel for this GPU)"
    ]
    with pytest.raises(ConfigError, match="neither of broken, also broken runs on this device"):
        fastest({"broken": failing, "also broken": failing}, lambda work: (work(), 1.0)[1])


@pytest.mark.parametrize(
    ("parallel", "calls"),
    [
        ({}, [((3, 32, 4, 16), (3, 32, 2, 16), 0)]),
        ({"tp": 2}, [((3, 32, 2, 16), (3, 32, 1, 16), 0)]),
        ({"cp": 2}, [((3, 8, 4, 16), (3, 32, 2, 16), begin) for begin in (0, 24)]),
    ],
)
@pytest.mark.parametrize("document_mask", [False, True])
def test_what_is_timed_is_the_runs_own_shape(
    parallel: dict[str, int], calls: list[Any], document_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Spy(attention_choice.Attend):
        def forward(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
            seen.append((tuple(q.shape), tuple(k.shape), options["query_offset"]))
            assert v.shape == k.shape and q.dtype == torch.float32
            assert options["doc_lengths"] == ([8] * 12 if document_mask else None)
            return super().forward(q, k, v, **options)

    monkeypatch.setattr(attention_choice, "Attend", Spy)
    config = config_with(**parallel)
    config = replace(config, data=replace(config.data, document_mask=document_mask))
    one_layer(config, CPU)("sdpa")
    assert seen == calls


def test_auto_on_cuda_times_both_and_a_named_one_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = {"xformers": 1.0, "sdpa": 2.0}
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention_choice, "one_layer", lambda *_: layer.__getitem__)
    monkeypatch.setattr(attention_choice, "time_on_cuda_ms", lambda work: work())
    assert resolve_backend(config_with(), cuda) == "xformers"
    layer["sdpa"] = 0.5
    assert resolve_backend(config_with(), cuda) == "sdpa"
    assert resolve_backend(config_with("xformers"), cuda) == "xformers"
    del layer["xformers"]
    assert resolve_backend(config_with(), cuda) == "sdpa"
    with pytest.raises(ConfigError, match=r"xformers cannot run: KeyError.*; set model\.attention=sdpa"):
        resolve_backend(config_with("xformers"), cuda)
