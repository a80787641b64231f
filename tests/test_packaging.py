"""What users install: a wheel that carries its configuration, imports nothing heavy, refuses an old torch."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llamatrain.device import check_torch
from llamatrain.errors import ConfigError
from tests.small_run import saved_steps

REPOSITORY = Path(__file__).parent.parent


def test_an_unsupported_torch_is_refused_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ConfigError, match=r"torch 2\.9\.1\+cu128 is installed; llamatrain needs torch >= 2\.11"):
        check_torch()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    check_torch()


def test_xformers_fairscale_and_wandb_are_imported_only_when_used() -> None:
    code = (
        "import sys, llamatrain.trainer, llamatrain.generate; "
        "sys.exit(', '.join({'xformers', 'fairscale', 'wandb'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def run(*arguments: str | Path, cwd: Path, python: Path, extra: dict[str, str] | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | (extra or {})
    done = subprocess.run([python, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_in_another_environment_trains_alone_and_under_torchrun(
    tiny_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    python = Path(sys.executable)
    source = tmp_path / "source"
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=REPOSITORY, capture_output=True, text=True)
    for name in filter(None, set(tracked.stdout.split("\0"))):  # a build must leave nothing in the tree
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path, python=python)
    run("-m", "venv", tmp_path / "other", cwd=tmp_path, python=python)
    other = tmp_path / "other" / "bin" / "python"
    site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path, python=other).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # all but llamatrain itself
    wheel = next(tmp_path.glob("llamatrain-*.whl"))
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path, python=other)

    where = run("-c", "import llamatrain.cli as c; print(c.config_directory())", cwd=tmp_path, python=other).strip()
    assert Path(where) == site / "llamatrain" / "conf"
    assert "name: llama_65b" in run(
        "-m", "llamatrain.train", "experiment=paper_65b", "--cfg", "job", cwd=tmp_path, python=other
    )
    data = tiny_dataset("text", ["she sells sea shells on the sea shore. " * 9] * 20, tmp_path / "data")
    run(
        "-m", "llamatrain.train", "model=15m", "model.dim=32", "model.n_layers=1", "model.n_heads=2",
        f"data.sources.text.path={data}", "data.seq_len=32", "train.steps=2", "train.global_batch_tokens=64",
        "optim.warmup_steps=1", "train.device=cpu", cwd=tmp_path, python=other,
    )  # fmt: skip
    assert saved_steps(tmp_path / "runs" / "llama") == [2]
    environment = {"PYTHON": str(other), "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = run("-c", "import launch; print(launch.__path__[0])", cwd=tmp_path, python=other).strip()
    run(
        f"{launcher}/torchrun.sh", "name=spread", "model=15m", "model.dim=32", "model.n_layers=1", "model.n_heads=2",
        f"data.sources.text.path={data}", "data.seq_len=32", "train.steps=2", "train.global_batch_tokens=64",
        "optim.warmup_steps=1", "train.device=cpu", cwd=tmp_path, python=Path("bash"), extra=environment,
    )  # fmt: skip
    assert len(list((tmp_path / "runs" / "spread" / "checkpoints" / "step-00000002").glob("model.rank*"))) == 2
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    (tmp_path / "mine" / "cluster" / "ours.yaml").write_text("defaults: [h100]\nname: ours\npartition: gpu\n")
    printed = run(
        "-m", "launch.slurm", "--config-dir=mine", "cluster=ours", "nodes=2", "model=15m", "dry_run=true",
        f"data.sources.text.path={data}", "train.steps=2", "optim.warmup_steps=1", cwd=tmp_path, python=other,
    )  # fmt: skip
    assert f"--partition=gpu --mem=0 --exclusive --signal=B:USR1@300 --output={tmp_path}/runs/llama/launch" in printed
    assert f"{launcher}/slurm/train.sbatch --config-dir=mine model=15m" in printed
    assert Path(launcher, "slurm", "train.sbatch").exists()
    assert "before every document" in run("-m", "data_tools.tokenize_shards", "--help", cwd=tmp_path, python=other)
