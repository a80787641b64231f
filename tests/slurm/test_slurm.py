"""The launch script on a real SLURM of two nodes: it trains, is signalled, requeued, killed, refused.

Every run is compared, bit for bit, with one of two processes that nobody disturbed. LLAMATRAIN_STATUS_LOG=FILE
appends what a reader of status.json saw in the meantime; the tables of docs/clusters.md were written from that.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import yaml

import launch
from llamatrain.checkpoint import commit
from tests.conftest import TINY_VOCAB
from tests.slurm.cluster import Cluster, Job, wait_until
from tests.small_run import assert_same_run, metrics, saved_steps, status

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPT = Path(launch.__path__[0]) / "slurm" / "train.sbatch"
REPOSITORY = Path(__file__).parent.parent.parent
STEPS = 200
PATIENCE_S = 120.0
TWO_NODES = ("--nodes=2", "--time=10")
SAME_BITS = "it ends bitwise like the undisturbed run"
SLOW_DISK = """
import os, threading, time

plain = os.fsync

def fsync(file):
    if threading.current_thread().name == "checkpoint":
        time.sleep(1)
    plain(file)

os.fsync = fsync
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTHON": sys.executable,
    "PYTHONPATH": str(REPOSITORY),
}


@pytest.fixture(scope="module")
def data(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"On day {i} the ship sailed {i * 7 % 31} leagues and saw nothing. " * 3 for i in range(200)]
    return tiny_dataset("text", texts, tmp_path_factory.mktemp("a directory") / "data", validation_fraction=0.05)


def settings(run_dir: Path, data: Path, *more: str) -> list[str]:
    """Two layers, 200 short steps, a save at every 25th, validation at every 50th."""
    return [
        f"run_dir={run_dir}",
        "model=15m",
        "model.dim=32",
        "model.n_layers=2",
        "model.n_heads=2",
        "model.ffn_multiple_of=32",
        f"model.vocab_size={TINY_VOCAB}",
        "model.max_seq_len=32",
        f"data.sources.text.path={data}",
        "data.seq_len=32",
        f"train.steps={STEPS}",
        "train.global_batch_tokens=256",
        "train.micro_batch=4",
        "train.device=cpu",
        "optim.warmup_steps=10",
        "checkpoint.every_steps=25",
        "logging.every_steps=1",
        "evaluation.every_steps=50",
        "evaluation.micro_batch=4",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two processes of torchrun that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "llamatrain.train"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *settings(run_dir, data)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return run_dir


class StatusWatch:
    """Collects every change of a run's status.json that a reader sees who looks 50 times a second."""

    def __init__(self, run_dir: Path) -> None:
        self.seen: list[dict[str, Any]] = []
        self._run_dir = run_dir
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            try:
                found = status(self._run_dir)
            except FileNotFoundError:
                continue
            if not self.seen or found != self.seen[-1]:
                self.seen.append(found)

    @property
    def states(self) -> list[str]:
        """The states seen, in order, each named once in a row."""
        states = [found["state"] for found in self.seen]
        return [state for i, state in enumerate(states) if i == 0 or state != states[i - 1]]

    @property
    def phases(self) -> set[str]:
        return {found["phase"] for found in self.seen if found["phase"]}

    @property
    def attempts(self) -> list[str]:
        return list(dict.fromkeys(found["attempt"] for found in self.seen))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.05)
        self._ended.set()
        self._thread.join()
        if path := os.environ.get("LLAMATRAIN_STATUS_LOG"):
            with open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"test": self._run_dir.parent.name, **found}) + "\n" for found in self.seen)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_records(job: Job, run_dir: Path, count: int) -> None:
    """Until the metrics have that many lines."""

    def there() -> bool:
        assert job.state in ("PENDING", "RUNNING", "CONFIGURING"), job.explain()
        return lines(run_dir / "metrics.jsonl") >= count

    wait_until(there, f"{count} records are written", PATIENCE_S, job.explain)


def journal(run_dir: Path, event: str) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == event]


def pid_of_rank(run_dir: Path, rank: int) -> int:
    starts = [line for line in (run_dir / "logs" / f"rank{rank:05d}.log").read_text().splitlines() if ", pid " in line]
    return int(starts[-1].rpartition("pid ")[2])


def test_a_job_of_two_nodes_trains_to_the_end(cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "a 'quoted' run"
    with StatusWatch(run_dir) as watch:
        job = cluster.submit(*TWO_NODES, SCRIPT, *settings(run_dir, data), cwd=tmp_path, env=ENVIRONMENT)
        assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert job.fields()["ExitCode"] == "0:0"
    assert watch.states == ["running", "done"]
    assert watch.phases == {"starting", "training", "validating", "saving"}
    assert watch.attempts == [f"slurm-{job.number}-0"]
    assert "2 nodes, rendezvous at 127.0.0.1:" in job.output
    assert "not requeued: done at step 200" in job.output
    assert_same_run(undisturbed, run_dir, step=STEPS)


def test_a_signalled_job_saves_is_requeued_and_ends_in_the_same_bits(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with StatusWatch(run_dir) as watch:
        job = cluster.submit(*TWO_NODES, SCRIPT, *settings(run_dir, data), cwd=tmp_path, env=ENVIRONMENT)
        wait_for_records(job, run_dir, 60)
        job.signal_batch_shell("USR1")
        job.wait_for_requeue(1, PATIENCE_S)
        stopped = status(run_dir)
        assert (stopped["state"], stopped["reason"]) == ("preempted", "control/stop")
        assert 60 <= stopped["step"] < STEPS
        assert saved_steps(run_dir)[-1] == stopped["step"]
        assert not (run_dir / "control" / "stop").exists()
        (run_dir / "control" / "stop").write_text("slurm-1-7")  # as a launch that died would leave it
        assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert watch.states == ["running", "preempted", "running", "done"]
    assert watch.attempts == [f"slurm-{job.number}-0", f"slurm-{job.number}-1"]
    assert [entry["resumed_from"] for entry in journal(run_dir, "start")] == [None, stopped["step"]]
    assert f"job {job.number}, restart 1," in job.output
    assert_same_run(undisturbed, run_dir, step=STEPS)


def test_a_killed_process_comes_back_within_the_job_and_the_bits_are_the_same(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with StatusWatch(run_dir) as watch:
        job = cluster.submit(*TWO_NODES, SCRIPT, *settings(run_dir, data), cwd=tmp_path, env=ENVIRONMENT)
        wait_for_records(job, run_dir, 60)
        os.kill(pid_of_rank(run_dir, 1), signal.SIGKILL)
        assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert watch.states == ["running", "done"]
    assert watch.attempts == [f"slurm-{job.number}-0"]
    resumed = [entry["resumed_from"] for entry in journal(run_dir, "start")]
    assert len(resumed) == 2
    assert resumed[1] in (50, 75, 100)
    assert job.fields()["Restarts"] == "0"
    assert_same_run(undisturbed, run_dir, step=STEPS)


def test_a_job_whose_restarts_are_used_up_is_requeued_and_ends_in_the_same_bits(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with StatusWatch(run_dir) as watch:
        environment = {**ENVIRONMENT, "MAX_RESTARTS": "0"}
        job = cluster.submit(*TWO_NODES, SCRIPT, *settings(run_dir, data), cwd=tmp_path, env=environment)
        wait_for_records(job, run_dir, 60)
        os.kill(pid_of_rank(run_dir, 1), signal.SIGKILL)
        job.wait_for_requeue(1, PATIENCE_S)
        assert "requeue: crashed at step" in job.output
        assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert watch.states == ["running", "done"]
    assert watch.attempts == [f"slurm-{job.number}-0", f"slurm-{job.number}-1"]
    assert_same_run(undisturbed, run_dir, step=STEPS)


@pytest.mark.drill("a node of a SLURM job is lost", f"SLURM requeues the job; {SAME_BITS}")
def test_a_node_that_is_lost_makes_slurm_requeue_the_job_which_ends_in_the_same_bits(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = cluster.submit(*TWO_NODES, SCRIPT, *settings(run_dir, data), cwd=tmp_path, env=ENVIRONMENT)
    wait_for_records(job, run_dir, 60)
    cluster.kill_node("n1")
    wait_until(lambda: job.fields()["Restarts"] == "1", "SLURM has missed the node", PATIENCE_S, job.explain)
    cluster.start_node("n1")
    job.wait_for_requeue(1, PATIENCE_S)
    assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert job.fields()["Restarts"] == "1"
    attempts = [entry["attempt"] for entry in journal(run_dir, "launch")]
    assert attempts[0] == f"slurm-{job.number}-0"
    assert attempts[-1] == f"slurm-{job.number}-1"
    resumed = [entry["resumed_from"] for entry in journal(run_dir, "start")]
    assert resumed[-1] >= 50
    assert_same_run(undisturbed, run_dir, step=STEPS)


@pytest.mark.drill("a job is preempted while a save is written beside training", f"both saves are whole; {SAME_BITS}")
def test_a_job_is_preempted_while_a_save_is_written_beside_training(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    arguments = settings(run_dir, data, "checkpoint.asynchronous=true")
    job = cluster.submit(*TWO_NODES, SCRIPT, *arguments, cwd=tmp_path, env=environment)
    unfinished = commit.temporary_directory(run_dir / "checkpoints", 25)
    wait_until(unfinished.exists, "the first save has begun", PATIENCE_S, job.explain)
    job.signal_batch_shell("USR1")
    job.wait_for_requeue(1, PATIENCE_S)
    stopped = status(run_dir)
    assert (stopped["state"], stopped["reason"]) == ("preempted", "control/stop")
    assert 25 < stopped["step"] < STEPS
    assert saved_steps(run_dir)[-1] == stopped["step"]
    noted = [entry["step"] for entry in journal(run_dir, "checkpoint")]
    assert noted[0] == 25  # under way when the signal came
    assert stopped["step"] in noted  # on a quick machine there is another in between
    assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert [entry["resumed_from"] for entry in journal(run_dir, "start")] == [None, stopped["step"]]
    assert_same_run(undisturbed, run_dir, step=STEPS)


def test_a_bad_configuration_is_not_requeued(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = settings(run_dir, data)
    job = cluster.submit("--nodes=2", SCRIPT, *arguments, "model=nine", cwd=tmp_path, env=ENVIRONMENT)
    assert job.wait(PATIENCE_S) == "FAILED", job.explain()
    assert job.fields()["ExitCode"] == "2:0"
    assert "model=nine: there is no such choice" in job.output
    assert not run_dir.exists()

    job = cluster.submit("--nodes=2", SCRIPT, *arguments, "train.step=3", cwd=tmp_path, env=ENVIRONMENT)
    assert job.wait(PATIENCE_S) == "FAILED", job.explain()
    assert job.output == "error: train.step: there is no such setting; did you mean train.steps?\n"

    indivisible = [*arguments, "train.global_batch_tokens=100"]  # only the processes know how many they are
    job = cluster.submit("--nodes=2", SCRIPT, *indivisible, cwd=tmp_path, env=ENVIRONMENT)
    assert job.wait(PATIENCE_S) == "FAILED", job.explain()
    assert "error: train.global_batch_tokens=100 does not divide" in job.output
    assert "not requeued: it ended before it wrote a status" in job.output


def test_a_run_that_is_continued_wrongly_is_not_requeued_and_its_status_says_why(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    short = settings(run_dir, data, "train.stop_after_step=3", "checkpoint.every_steps=2")
    job = cluster.submit(*TWO_NODES, SCRIPT, *short, cwd=tmp_path, env=ENVIRONMENT)
    assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    assert "not requeued: preempted at step 3 (train.stop_after_step=3): asked for by a person" in job.output

    with StatusWatch(run_dir) as watch:
        wrong = settings(run_dir, data, "train.global_batch_tokens=512")
        job = cluster.submit(*TWO_NODES, SCRIPT, *wrong, cwd=tmp_path, env=ENVIRONMENT)
        assert job.wait(PATIENCE_S) == "FAILED", job.explain()
    assert watch.states[-1] == "bad_input"
    assert "train.global_batch_tokens" in watch.seen[-1]["reason"]
    assert "not requeued: bad_input at step 3" in job.output
    assert job.fields()["Restarts"] == "0"


def test_the_time_limit_requeues_a_run_and_scancel_ends_it_for_good(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    endless = settings(run_dir, data, "train.steps=100000", "checkpoint.every_steps=100000", "evaluation.every_steps=0")
    limit = ("--nodes=2", "--time=1", "--signal=B:USR1@40")
    with StatusWatch(run_dir) as watch:
        job = cluster.submit(*limit, SCRIPT, *endless, cwd=tmp_path, env=ENVIRONMENT)
        job.wait_for_requeue(1, PATIENCE_S)
        stopped = status(run_dir)
        assert (stopped["state"], saved_steps(run_dir)) == ("preempted", [stopped["step"]])
        wait_for_records(job, run_dir, stopped["step"] + 20)
        job.cancel()
        assert job.wait(PATIENCE_S) == "CANCELLED", job.explain()
        wait_until(
            lambda: "not requeued: SLURM has ended the job" in job.output, "the script has ended", 10, job.explain
        )
    assert watch.states == ["running", "preempted", "running", "preempted"]
    assert saved_steps(run_dir)[-1] == len(metrics(run_dir)) == status(run_dir)["step"]
    time.sleep(2)
    assert job.state == "CANCELLED"


# ---------------------------------------------------------------------- python -m launch.slurm


def launched(cluster: Cluster, cwd: Path, *arguments: str, restarts: int = 3) -> list[Job]:
    """The jobs that `python -m launch.slurm` submits."""
    command = [sys.executable, "-m", "launch.slurm", "cluster=local", "nodes=2", *arguments]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "MAX_RESTARTS": str(restarts)}
    printed = cluster.command(*command, cwd=cwd, env=environment)
    return [Job(cluster, int(number)) for number in re.findall(r"^job (\d+),", printed, re.MULTILINE)]


@pytest.mark.drill("none: python -m launch.slurm", f"two nodes train to the end; {SAME_BITS}")
def test_launch_slurm_submits_what_trains_to_the_end(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "50% of a 'quoted' run"
    name = """it's "a" $HOME [name], {of} *"""
    (job,) = launched(cluster, tmp_path, *settings(run_dir, data, f"name={name}"))
    assert job.wait(PATIENCE_S) == "COMPLETED", job.explain()
    output = (run_dir / "launch" / f"job-{job.number}.out").read_text()
    assert "not requeued: done at step 200" in output
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["name"] == name
    assert_same_run(undisturbed, run_dir, step=STEPS)


@pytest.mark.drill(
    "jobs of a chain are signalled and cancelled", f"the next goes on, the last has nothing to do; {SAME_BITS}"
)
def test_jobs_of_a_chain_go_on_one_after_the_other_and_leave_at_once_when_all_is_done(
    cluster: Cluster, data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first, second, third, fourth = launched(cluster, tmp_path, "chain=4", *settings(run_dir, data))
    wait_for_records(first, run_dir, 40)
    assert second.fields()["Reason"] == "Dependency"
    first.signal_batch_shell("USR1")  # as the time limit would
    assert first.wait(PATIENCE_S) == "COMPLETED", first.explain()
    stopped = status(run_dir)["step"]
    wait_for_records(second, run_dir, stopped + 20)
    second.cancel()
    assert second.wait(PATIENCE_S) == "CANCELLED", second.explain()
    assert third.wait(PATIENCE_S) == "COMPLETED", third.explain()
    assert fourth.wait(PATIENCE_S) == "COMPLETED", fourth.explain()
    assert [job.fields()["Restarts"] for job in (first, second, third, fourth)] == ["0"] * 4
    assert "the next job of the chain is to go on: preempted" in first.output
    assert "not requeued: done at step 200" in third.output
    assert "nothing to do, the chain has ended: done at step 200" in fourth.output
    assert [entry["resumed_from"] for entry in journal(run_dir, "start")][:2] == [None, stopped]
    assert [entry["attempt"] for entry in journal(run_dir, "start")] == [
        f"slurm-{job.number}-0" for job in (first, second, third)
    ]
    assert_same_run(undisturbed, run_dir, step=STEPS)


def test_a_run_that_is_unhealthy_ends_its_chain(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first, second = launched(cluster, tmp_path, "chain=2", *settings(run_dir, data, "optim.lr=1e30"), restarts=0)
    assert first.wait(PATIENCE_S) == "FAILED", first.explain()
    assert second.wait(PATIENCE_S) == "FAILED", second.explain()
    assert "nothing to do, the chain has ended: unhealthy at step" in second.output
    assert len(journal(run_dir, "launch")) == 1
