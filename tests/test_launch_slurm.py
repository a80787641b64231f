"""`python -m launch.slurm`: what it refuses, and what it hands to an sbatch that only notes it.

What a real SLURM does with the jobs is tested in tests/slurm.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import launch.slurm
from launch.slurm.config import ClusterConfig, LaunchConfig, check_launch
from launch.slurm.job import job_number, sbatch_options, setup_file, setup_path, shell_script, training_arguments
from llamatrain.arithmetic import peak_flops
from llamatrain.config.build import build
from llamatrain.errors import ConfigError

REPOSITORY = Path(__file__).parent.parent
CLUSTERS = {path.stem: path for path in (REPOSITORY / "conf" / "cluster").glob("*.yaml")}
SCRIPT = str(Path(launch.slurm.__path__[0]) / "train.sbatch")
RUN = ["data.sources.web.path=/data", "train.steps=10", "optim.warmup_steps=1", "train.global_batch_tokens=65536"]
NOTING_SBATCH = """\
#!/bin/bash
printf '%s\\0' "$LLAMATRAIN_SETUP" "${LLAMATRAIN_CHAIN:-}" "$@" >> "$NOTE" && printf '\\n\\0' >> "$NOTE"
(( $(wc -l < "$NOTE") <= ${MOST_JOBS:-9} )) || { echo "no more" >&2 && exit 1; }
echo "$(( 40 + $(wc -l < "$NOTE") ));a-cluster"
"""


def launch_config(**changes: Any) -> LaunchConfig:
    values = {
        "data": {"sources": {"web": {"path": "/data"}}},
        "train": {"steps": 10, "global_batch_tokens": 65536},
        "optim": {"warmup_steps": 1},
        "cluster": {"name": "ours", "gpus_per_node": 8},
        "nodes": 4,
    }
    return replace(build(LaunchConfig, values), **changes)


def start(
    cwd: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own, with an sbatch that notes what it is given in cwd/note."""
    programs = cwd / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "sbatch").write_text(NOTING_SBATCH)
    (programs / "sbatch").chmod(0o755)
    variables = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "LLAMATRAIN"))},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "NOTE": str(cwd / "note"),
        "PYTHONPATH": str(REPOSITORY),
        **(environment or {}),
    }
    command = [sys.executable, "-m", "launch.slurm", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def noted(note: Path) -> list[list[str]]:
    """Of each job: the setup file, the chain's name, and all of sbatch's arguments."""
    return [job.split("\0")[:-1] for job in note.read_text().split("\n\0")[:-1]]


def sourced(content: str, *names: str, directory: Path) -> list[str]:
    """What a shell knows of these variables when it has read a setup file."""
    path = directory / "setup.sh"
    path.write_text(content, newline="")
    script = 'source "$0"; for name; do printf "%s\\0" "${!name-unset}"; done'
    done = subprocess.run(["bash", "-c", script, path, *names], capture_output=True, text=True, env={})
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


# ---------------------------------------------------------------------- the files of conf/cluster


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_clusters_file_is_of_the_schema_and_its_accelerator_is_known(name: str) -> None:
    values = yaml.safe_load(CLUSTERS[name].read_text())
    cluster = build(ClusterConfig, values)
    check_launch(launch_config(cluster=cluster, nodes=2))
    assert cluster.name == name
    assert cluster.processes == (1 if name == "local" else 8)
    if name != "local":
        assert set(values) == {field.name for field in fields(ClusterConfig)}
        assert cluster.accelerator is not None
        assert peak_flops(cluster.accelerator) is not None


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cluster": ClusterConfig()}, "cluster=… is missing: choose one of a100_80gb, h100, h200, local"),
        ({"nodes": None}, "nodes=… is missing: nodes=N"),
        ({"nodes": 0}, "nodes=0: must be at least 1"),
        ({"chain": 0}, "chain=0: must be at least 1"),
        ({"nodes": 3}, "the nearest that does is train.global_batch_tokens=49152"),
        ({"time": "86400"}, "cluster.time=86400: write hours:minutes:seconds"),  # 24:00:00 as YAML reads it
        ({"gpus_per_node": -1}, "cluster.gpus_per_node=-1: must be at least 0"),
        ({"processes_per_node": 0}, "cluster.processes_per_node=0: must be at least 1"),
        ({"signal_before_limit_s": 0}, "cluster.signal_before_limit_s=0: must lie in"),
        ({"gpu_option": "--gres=gpu"}, "cluster.gpu_option=--gres=gpu: has no {} for the number"),
        ({"env": {"A B": "c"}}, "cluster.env.A B: is no name of a variable"),
        ({"env": {"NPROC_PER_NODE": "4"}}, "cluster.env.NPROC_PER_NODE: the launcher sets it"),
        ({"env": {"WANDB_API_KEY": "x"}}, "cluster.env.WANDB_API_KEY: a secret has no place in a file"),
        ({"sbatch": ["other.sbatch"]}, "cluster.sbatch: 'other.sbatch' is no option"),
        ({"sbatch": ["--export=NONE"]}, "cluster.sbatch: --export=NONE cannot be given there"),
        ({"container_mounts": ["/a"]}, "cluster.container_image=…"),
        ({"container_image": "x", "container_mounts": ["/a,b"]}, "has a comma"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(changes: dict[str, Any], message: str) -> None:
    known = {field.name for field in fields(ClusterConfig)}
    of_cluster = {key: value for key, value in changes.items() if key in known}
    config = launch_config(**{key: value for key, value in changes.items() if key not in of_cluster})
    with pytest.raises(ConfigError) as refusal:
        check_launch(replace(config, cluster=replace(config.cluster, **of_cluster)))
    assert message in str(refusal.value)


def test_gpus_that_a_cluster_has_not_are_refused() -> None:
    config = launch_config(cluster=ClusterConfig(name="ours"))
    with pytest.raises(ConfigError, match=r"train\.device=cuda and cluster\.gpus_per_node=0"):
        check_launch(replace(config, train=replace(config.train, device="cuda")))


@pytest.mark.parametrize("argument", ["--multirun", "-m", "--config-name=other", "name=a\nb"])
def test_arguments_that_no_job_can_have_are_refused(argument: str) -> None:
    with pytest.raises(ConfigError):
        training_arguments(["model=7b", argument])


# ---------------------------------------------------------------------- what is submitted


def test_the_training_gets_what_was_typed_but_for_the_launchers_own() -> None:
    typed = ["cluster=h100", "--config-dir", "mine", "nodes=2", "cluster.sbatch=[--x]", "model=7b", "++name=nodes=2"]
    own = ["chain=2", "dry_run=true", "job_name=x", "++cluster.time=1:00:00"]
    assert training_arguments([*typed, *own]) == ["--config-dir", "mine", "model=7b", "++name=nodes=2"]
    assert training_arguments(["--config-dir=mine", "train.dry_run=true"]) == [
        "--config-dir=mine",
        "train.dry_run=true",
    ]


def test_the_clusters_settings_become_options() -> None:
    cluster = ClusterConfig(
        name="ours",
        gpus_per_node=4,
        gpu_option="--gres=gpu:h100:{}",
        partition="big",
        account="us",
        qos="long",
        constraint="ib&h100",
        time="2-00:00:00",
        cpus_per_task=64,
        mem="0",
        signal_before_limit_s=600,
        sbatch=["--reservation=now"],
    )
    options = sbatch_options(launch_config(cluster=cluster, name="a run", run_dir="/runs/50%"))
    assert options == [
        "--job-name=a_run",
        "--nodes=4",
        "--gres=gpu:h100:4",
        "--partition=big",
        "--account=us",
        "--qos=long",
        "--constraint=ib&h100",
        "--time=2-00:00:00",
        "--cpus-per-task=64",
        "--mem=0",
        "--exclusive",
        "--signal=B:USR1@600",
        "--output=/runs/50%%/launch/job-%j.out",
        "--export=ALL",
        "--reservation=now",
    ]
    without = sbatch_options(launch_config(cluster=ClusterConfig(name="ours", exclusive=False), chain=2))
    assert not any(option.startswith(("--gpus", "--partition", "--time", "--exclusive")) for option in without)
    assert "--no-requeue" in without


def test_the_setup_file_exports_what_the_cluster_says_after_its_lines(tmp_path: Path) -> None:
    cluster = ClusterConfig(
        name="ours",
        gpus_per_node=8,
        network_interface="ib0",
        env={"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_SOCKET_IFNAME": "=eth0", "NCCL_DEBUG": None},
        setup=["export NCCL_IB_HCA=wrong A=$((1 + 1))", 'B="it\'s"'],
    )
    names = ("NPROC_PER_NODE", "PYTHON", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG")
    found = sourced(setup_file(cluster, python="/venv/bin/python"), *names, "A", "B", directory=tmp_path)
    assert found == ["8", "/venv/bin/python", "ib0", "=eth0", "mlx5_0,mlx5_1", "unset", "2", "it's"]
    inside = replace(cluster, container_image="docker://x#y", container_mounts=["/a b", "/c:/d"], python="python3.12")
    names = ("PYTHON", "CONTAINER_IMAGE", "CONTAINER_MOUNTS", "CONTAINER_PYTHON")
    found = sourced(setup_file(inside, python="/venv/bin/python"), *names, directory=tmp_path)
    assert found == ["python3.12", "docker://x#y", "/a b,/c:/d", "python3"]


TEXTS = st.text(st.characters(exclude_characters="\0\n\r", exclude_categories=["Cs"]), max_size=30)
AWKWARD = st.sampled_from(
    ["'", '"', "$HOME", "`ls`", "${x}", "a b", "*", "\\", "!", "SETUP", "%j", ";&|", "[1,2]", "#"]
)
WORDS = st.lists(TEXTS | AWKWARD, max_size=4).map("".join)
HERE_DOCUMENT = "cat > /dev/null <<'END'\nSETUP\nSETUP_\nEND"


@settings(max_examples=25, deadline=None)
@given(
    arguments=st.lists(WORDS, min_size=1, max_size=4),
    value=WORDS,
    directory=(TEXTS | AWKWARD).map(lambda text: "d" + text.replace("/", "_")),
    setup=st.sampled_from([[], [HERE_DOCUMENT]]),
)
def test_a_shell_gives_back_every_word_of_what_is_printed(
    arguments: list[str], value: str, directory: str, setup: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The printed commands, run: sbatch gets the arguments, a node the variable, whatever is in them."""
    work = tmp_path_factory.mktemp("shell")
    cluster = ClusterConfig(name="ours", gpus_per_node=8, env={"X": value}, setup=setup)
    config = launch_config(cluster=cluster, run_dir=str(work / directory), chain=2)
    content = setup_file(cluster, python="python3")
    printed = shell_script(config, arguments, content=content, chain_id="c")
    prelude = f"sbatch() {{\n{NOTING_SBATCH}}}\n"
    environment = {"NOTE": str(work / "note"), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash"], input=prelude + printed, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = noted(work / "note")
    written = setup_path(config, content)
    assert first[:2] == second[:2] == [str(written), "c"]
    assert first[first.index(SCRIPT) + 1 :] == second[second.index(SCRIPT) + 1 :] == arguments
    assert second[2] == "--dependency=afterany:41"
    assert first[2:] == second[3:]
    assert written.read_text() == content
    assert sourced(content, "X", directory=work) == [value]


def test_a_number_is_found_in_what_sbatch_prints() -> None:
    assert job_number("17\n") == "17"
    assert job_number("be nice\n17;cluster\n") == "17"
    with pytest.raises(ConfigError, match="sbatch was to print a job's number"):
        job_number("Submitted batch job 17\n")


# ---------------------------------------------------------------------- the command


def test_a_launch_of_ones_own_cluster_is_submitted_as_it_was_printed(tmp_path: Path) -> None:
    (tmp_path / "mine" / "cluster").mkdir(parents=True)
    (tmp_path / "mine" / "cluster" / "ours.yaml").write_text(
        "defaults: [h100]\nname: ours\npartition: gpu\nenv: {NCCL_IB_HCA: mlx5}\nsetup: [echo loaded]\n"
    )
    typed = ["--config-dir=mine", "cluster=ours", "nodes=2", "chain=3", "name=it's $HOME", "model=15m", *RUN]
    typed += ["cluster.time=24:00:00", "data.seq_len=128"]
    secret = {"WANDB_API_KEY": "xyzzy-planted"}
    printed = start(tmp_path, *typed, "dry_run=true", environment=secret)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "programs"]
    assert printed.stdout.startswith("# 2 nodes x 8 = 16 processes (NVIDIA H100 80GB HBM3)\n")

    done = start(tmp_path, *typed, environment=secret)
    assert done.returncode == 0, done.stderr
    jobs = noted(tmp_path / "note")
    (tmp_path / "note").unlink()
    environment = {**os.environ, "NOTE": str(tmp_path / "note"), "PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    subprocess.run(["bash"], input=printed.stdout, env=environment, cwd=tmp_path, text=True, check=True)
    by_hand = noted(tmp_path / "note")
    assert [job[2:] for job in jobs] == [job[2:] for job in by_hand]
    assert len({job[1] for job in jobs}) == 1
    assert jobs[0][1] != by_hand[0][1]  # another chain
    waiting = [[word for word in job if word.startswith("--dependency")] for job in jobs]
    assert waiting == [[], ["--dependency=afterany:41"], ["--dependency=afterany:42"]]
    for option in ("--partition=gpu", "--time=24:00:00", "--gpus-per-node=8", "--no-requeue"):
        assert option in jobs[0]
    arguments = jobs[0][jobs[0].index(SCRIPT) + 1 :]
    assert arguments == ["--config-dir=mine", "name=it's $HOME", "model=15m", *RUN, "data.seq_len=128"]

    folder = tmp_path / "runs" / "it's $HOME" / "launch"
    (setup,) = folder.iterdir()
    assert setup == Path(jobs[0][0])
    assert "echo loaded" in setup.read_text()
    assert "NCCL_IB_HCA=mlx5" in setup.read_text()
    assert "xyzzy-planted" not in printed.stdout + done.stdout + setup.read_text()
    assert f"job 41, its output: {folder}/job-41.out" in done.stdout
    assert "scancel 41 42 43 ends all of it" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cluster=h1000"],
            "error: cluster=h1000: there is no such choice; did you mean cluster=h100? conf/cluster has",
        ),
        (["cluster=h100", "nodes=3", "model=15m", *RUN], "error: train.global_batch_tokens=65536 does not divide"),
        (["cluster=h100", "nodes=2", "model=15m", *RUN, "cluster.tim=1"], "did you mean cluster.time?"),
    ],
)
def test_what_is_refused_is_not_submitted(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = start(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["programs"]


def test_an_sbatch_that_refuses_a_job_is_told_with_what_was_submitted(tmp_path: Path) -> None:
    whole = ["cluster=local", "nodes=2", "chain=3", "model=15m", *RUN]
    done = start(tmp_path, *whole, environment={"MOST_JOBS": "1"})
    assert done.returncode == 1
    assert "no more" in done.stderr
    assert "sbatch did not take job 2 of 3, see above; submitted before: 41 (scancel 41 takes them back)" in done.stderr

    done = start(tmp_path, *whole, environment={"LLAMATRAIN_SETUP": "/my setup"})
    assert done.returncode == 2
    assert "make `source '/my setup'` one of the lines of cluster.setup" in done.stderr
