"""The command as users start it: torchrun, its restarts, its signals, what reaches the screen."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from tests.small_run import assert_same_run, metrics, saved_steps, status

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PATIENCE_S = 120
SHAPE = [
    "model=15m", "model.dim=64", "model.n_layers=2", "model.n_heads=2", "model.vocab_size=512", "data.seq_len=32",
    "train.global_batch_tokens=256", "train.micro_batch=2", "train.device=cpu", "optim.lr=6e-4",
    "optim.warmup_steps=10", "logging.every_steps=1", "train.steps=60", "checkpoint.every_steps=5",
]  # fmt: skip


def start(
    arguments: list[str],
    *,
    ranks: int = 2,
    restarts: int = 0,
    script: tuple[str, ...] = ("-m", "llamatrain.train"),
    output: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, f"--max-restarts={restarts}", *script, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=output, text=True)


def finish(process: subprocess.Popen[str], *, patience_s: float = PATIENCE_S) -> tuple[int, str, str]:
    """(exit status, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"torchrun did not end:\n{out}\n{err}") from None
    return process.returncode, out, err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def step_reached(run_dir: Path) -> int:
    """The last whole record's step."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def workers(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of the launcher's workers by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) != launcher.pid:
                continue
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (ValueError, OSError, IndexError):
            continue
        ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(entry.name)
    return found


@pytest.fixture(scope="module")
def data(tiny_dataset: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    texts = [f"On day {i} the ship sailed {i * 7 % 31} leagues and saw nothing. " * 3 for i in range(200)]
    directory = tiny_dataset("text", texts, tmp_path_factory.mktemp("data"), validation_fraction=0.05)
    return f"data.sources.text.path={directory}"


@pytest.fixture(scope="module")
def undisturbed(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(run directory, stdout, stderr) of a run on two processes."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    exit_status, out, err = finish(start([*SHAPE, data, f"run_dir={run_dir}"]))
    assert exit_status == 0, err
    return run_dir, out, err


def test_only_rank_0_prints(undisturbed: tuple[Path, str, str]) -> None:
    run_dir, out, err = undisturbed
    assert [line.split("/")[0].split()[-1] for line in out.splitlines() if line.startswith("step")] == [
        str(record["step"]) for record in metrics(run_dir)
    ]
    assert err.count("saved step-00000060") == err.count("done: step 60 of 60") == 1
    for rank in (0, 1):
        assert "done: step 60 of 60" in (run_dir / "logs" / f"rank{rank:05d}.log").read_text()


def test_killed_ranks_come_back_and_the_weights_are_those_of_the_undisturbed_run(
    data: str, undisturbed: tuple[Path, str, str], tmp_path: Path
) -> None:
    process = start([*SHAPE, data, f"run_dir={tmp_path}"], restarts=4)
    for rank, step in ((1, 7), (0, 18), (1, 31)):
        wait_for(lambda step=step: step_reached(tmp_path) >= step and len(workers(process)) == 2, process)
        killed = workers(process)
        os.kill(killed[rank], signal.SIGKILL)
        wait_for(lambda killed=killed: not set(workers(process).values()) & set(killed.values()), process)
    exit_status, _, err = finish(process)
    assert exit_status == 0, err
    assert status(tmp_path)["state"] == "done"
    assert_same_run(undisturbed[0], tmp_path, step=60)
    starts = [line for line in (tmp_path / "journal.jsonl").read_text().splitlines() if '"event": "launch"' in line]
    assert len(starts) == 4
    assert len({json.loads(line)["attempt"] for line in starts}) == 1


def test_without_a_watchdog_a_rank_that_hangs_ends_in_a_time_out_and_a_restart(
    data: str, undisturbed: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")  # torchrun's patience with a worker that does not react
    unwatched = ["resilience.hang_timeout_s=0", "resilience.hang_timeout_at_start_s=0"]
    process = start([*SHAPE, data, f"run_dir={tmp_path}", "parallel.timeout_s=4", *unwatched], restarts=1)
    wait_for(lambda: step_reached(tmp_path) >= 12 and len(workers(process)) == 2, process)
    os.kill(workers(process)[1], signal.SIGSTOP)
    exit_status, _, err = finish(process)
    assert exit_status == 0, err
    assert "Timed out waiting 4000ms" in err
    assert_same_run(undisturbed[0], tmp_path, step=60)


def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(
    data: str, undisturbed: tuple[Path, str, str], tmp_path: Path
) -> None:
    process = start([*SHAPE, data, f"run_dir={tmp_path}"])
    wait_for(lambda: step_reached(tmp_path) >= 12, process)
    process.send_signal(signal.SIGTERM)
    exit_status, _, _ = finish(process)
    assert exit_status != 0  # torchrun's, whatever its workers' was
    found = status(tmp_path)
    assert (found["state"], found["reason"]) == ("preempted", "SIGTERM")
    assert saved_steps(tmp_path)[-1] == found["step"] < 60
    exit_status, _, err = finish(start([*SHAPE, data, f"run_dir={tmp_path}"]))
    assert exit_status == 0, err
    assert_same_run(undisturbed[0], tmp_path, step=60)


def test_ranks_whose_torchrun_is_killed_save_and_leave(data: str, tmp_path: Path) -> None:
    process = start([*SHAPE, data, f"run_dir={tmp_path}"])
    wait_for(lambda: step_reached(tmp_path) >= 7, process)
    left = list(workers(process).values())
    process.kill()
    process.wait()
    deadline = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = status(tmp_path)
    assert (found["state"], found["reason"]) == ("preempted", "the launcher is gone")
    assert saved_steps(tmp_path)[-1] == found["step"] < 60


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_failing_rank_s_traceback_is_what_the_user_sees(rank: int, data: str, tmp_path: Path) -> None:
    arguments = [str(rank), "8", *SHAPE, data, f"run_dir={tmp_path}"]
    exit_status, out, err = finish(start(arguments, script=("-m", "tests.distributed.planted")))
    assert exit_status == 1
    assert err.count('raise ZeroDivisionError("planted on purpose")') == 1
    assert "Connection closed by peer" not in out + err
    root_cause = err.partition("Root Cause")[2]
    assert f"rank {rank} on" in root_cause and "ZeroDivisionError: planted on purpose" in root_cause
    assert "That rank failed first" in (tmp_path / "logs" / f"rank{1 - rank:05d}.log").read_text()
    assert status(tmp_path)["state"] == "running"
    assert saved_steps(tmp_path) == [5]


def test_bad_input_is_told_once_and_restarts_leave_at_once(data: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    exit_status, _, err = finish(
        start([*SHAPE, f"data.sources.text.path={tmp_path}/data", f"run_dir={tmp_path}/run"], restarts=2)
    )
    assert exit_status == 1
    assert err.count("error: data.sources.text:") == 1
    assert status(tmp_path / "run")["state"] == "bad_input"
    assert err.count("this attempt ended as bad_input") >= 2
    log = (tmp_path / "run" / "logs" / "rank00000.log").read_text()
    assert log.count("--- ") == 1  # the restarts did not come so far
    good = [*SHAPE, data, f"run_dir={tmp_path}/run", "train.steps=10", "optim.warmup_steps=5"]
    assert finish(start(good))[0] == 0  # a new attempt starts afresh


def test_ranks_with_different_configurations_are_named(data: str, tmp_path: Path) -> None:
    command = (
        f"exec {sys.executable} -m llamatrain.train {' '.join(SHAPE)} {data} run_dir={tmp_path}/run train.seed=$RANK"
    )
    exit_status, _, err = finish(start([], script=("--no-python", "bash", "-c", command)))
    assert exit_status == 1
    assert err.count("error: rank 1 on ") == 1
    assert "has another configuration: train.seed is 1 there, 0 on rank 0" in err
    assert not (tmp_path / "run").exists()


def test_a_sweep_under_torchrun_is_refused(data: str, tmp_path: Path) -> None:
    exit_status, _, err = finish(start([*SHAPE, data, f"run_dir={tmp_path}", "-m", "optim.lr=1e-4,2e-4"]))
    assert exit_status == 1
    assert err.count("error: --multirun under torchrun: every job of a sweep needs processes of its own") == 1


def test_a_refusal_before_the_ranks_have_met_is_told_once(data: str, tmp_path: Path) -> None:
    for _ in range(3):
        exit_status, _, err = finish(start([*SHAPE, data, f"run_dir={tmp_path}", "parallel.dp_replicate=3"], ranks=4))
        assert exit_status == 1
        assert err.count("error: parallel.dp_replicate=3 makes 3 ranks, there are 4: the nearest that works is") == 1


def test_a_rank_that_does_not_come_is_named(data: str, tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "llamatrain.train", *SHAPE, data, f"run_dir={tmp_path}/run"]
    command.append("parallel.host_timeout_s=2")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "error: 1 of 2 processes did not come within 2 s: rank 1" in done.stderr


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(data: str, tmp_path: Path) -> None:
    exit_status, out, err = finish(start([*SHAPE, data, f"run_dir={tmp_path}/deep/run/", "train.dry_run=true"]))
    assert exit_status == 0, err
    assert "peak memory" in out and "what came back is what was saved" in out
    assert "loss 6.2" in out  # that of a model that knows nothing: ln 512
    assert list(tmp_path.iterdir()) == []
