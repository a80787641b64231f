"""The numbers that metrics and planner stand on."""

from pathlib import Path

import pytest
import yaml

from llamatrain.arithmetic import flops_per_token, parameter_count, peak_flops
from llamatrain.config.build import build
from llamatrain.config.model import ModelConfig, check_model

PRESETS = Path(__file__).parent.parent / "conf" / "model"
COUNTS = {
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "33b": 32_528_943_616,
    "65b": 65_285_660_672,
    "15m": 15_191_712,
    "110m": 109_529_856,
    "300m": 296_784_896,
    "1b": 1_055_991_808,
}


def preset(name: str) -> ModelConfig:
    return build(ModelConfig, yaml.safe_load((PRESETS / f"{name}.yaml").read_text()))


def test_every_preset_is_counted_here():
    assert {path.stem for path in PRESETS.glob("*.yaml")} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_preset_has_exactly_its_parameters(name):
    model = preset(name)
    check_model(model)
    assert parameter_count(model) == COUNTS[name]
    assert f"{COUNTS[name]:,}" in (PRESETS / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "shape"),
    {
        "7b": (4096, 32, 32, 11008, 1e-6),
        "13b": (5120, 40, 40, 13824, 1e-6),
        "33b": (6656, 60, 52, 17920, 1e-6),
        "65b": (8192, 80, 64, 22016, 1e-5),
        "300m": (1024, 18, 16, 2816, 1e-6),
        "1b": (2048, 18, 16, 5632, 1e-6),
    }.items(),
)
def test_preset_has_the_shape_of_the_paper(name, shape):
    model = preset(name)
    assert (model.dim, model.n_layers, model.n_heads, model.ffn_width, model.norm_eps) == shape


def test_mfu_of_the_papers_7b_run_comes_out():
    # 1.0T tokens in 82,432 A100 hours is 47.2 % of 312 TFLOP/s.
    flops = 1.0e12 * flops_per_token(preset("7b"), 2048)
    assert flops / (82_432 * 3600 * 312e12) == pytest.approx(0.472, abs=0.001)


def test_flops_follow_the_palm_convention():
    model = preset("15m")
    whole = 6 * 15_191_712 + 12 * 6 * 288 * 256
    assert flops_per_token(model, 256) == whole
    assert whole - flops_per_token(model, 256, causal=True) == 6 * 6 * 288 * 256


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("Tesla V100-SXM2-32GB", 125),
    ],
)
def test_known_accelerator_has_its_peak(name, tera):
    assert peak_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name", ["cpu", "", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_unknown_accelerator_has_no_peak(name):
    assert peak_flops(name) is None
