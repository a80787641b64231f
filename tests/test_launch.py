"""The launch scripts, with torchrun, srun and scontrol replaced by programs that note what they were asked.

What SLURM itself does with the script is tested on a real one, in tests/slurm.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import launch
from launch.requeue import decision
from llamatrain.run_directory import BAD_INPUT, DONE, PREEMPTED, RUNNING, UNHEALTHY

SCRIPTS = Path(launch.__path__[0])
TORCHRUN, SBATCH = SCRIPTS / "torchrun.sh", SCRIPTS / "slurm" / "train.sbatch"
REPOSITORY = Path(__file__).parent.parent
PATIENCE_S = 20.0

FAKE_PYTHON = """\
#!/bin/bash
if [[ $1 == -m && $2 == torch.distributed.run ]]; then exec "{python}" "{directory}/torchrun.py" "${{@:3}}"; fi
exec "{python}" "$@"
"""
FAKE_TORCHRUN = """\
import json, os, signal, sys, time
from pathlib import Path
from llamatrain.process import attempt_id

plan = json.loads(os.environ["PLAN"])
run_dir, signals = Path(plan["run_dir"]), []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, _: signals.append(signal.Signals(number).name))
note = {"arguments": sys.argv[1:], "attempt": attempt_id(), "signals": signals}
note["threads"] = os.environ["OMP_NUM_THREADS"]
write = lambda: Path(os.environ["NOTE"]).write_text(json.dumps(note))
write()
Path(os.environ["NOTE"] + ".ready").touch()
while plan["waits"] and not (run_dir / "control" / "stop").exists():
    time.sleep(0.01)
time.sleep(plan["saves_s"])
write()
if plan["state"]:
    attempt = plan["attempt"] or attempt_id()
    status = {"state": plan["state"], "step": 7, "reason": plan["reason"], "attempt": attempt}
    run_dir.mkdir(exist_ok=True)
    (run_dir / "status.json").write_text(json.dumps(status))
sys.exit(plan["exit"])
"""
FAKE_SRUN = """\
#!/bin/bash
while [[ $1 == --* ]]; do options+=("$1") && shift; done
printf '%s\\n' "${options[@]}" > "$NOTE.srun"
exec "$@"
"""
FAKE_SCONTROL = """\
#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'n7\\nn8\\n' ;;
    "show node") echo "NodeName=$4 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=$4" ;;
    "show job") echo "JobId=$4 JobName=x JobState=$JOB_STATE Reason=None" ;;
    requeue*) echo "$2" > "$NOTE.requeued" ;;
esac
"""


def heed_signals() -> None:
    """However pytest was started: a shell cannot trap what was ignored when it began (nohup, a job in background)."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Launch:
    """One start of a script, and what it is to meet."""

    script: Path
    directory: Path
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    state: str | None = DONE
    reason: str | None = None
    attempt: str | None = None  # whose status it is; this launch's
    exit_status: int = 0
    waits: bool = False  # until it is asked to stop
    saves_s: float = 0.0
    job_state: str = "RUNNING"

    @property
    def run_dir(self) -> Path:
        return self.directory / "a run's folder"

    @property
    def stop_file(self) -> Path:
        return self.run_dir / "control" / "stop"

    @property
    def note(self) -> dict[str, Any]:
        """What torchrun noted: its arguments, the attempt, the signals it got."""
        noted: dict[str, Any] = json.loads((self.directory / "note").read_text())
        return noted

    @property
    def requeued(self) -> bool:
        return (self.directory / "note.requeued").exists()

    def start(self) -> "subprocess.Popen[str]":
        """Start it in a process group of its own, as a terminal would."""
        programs = self.directory / "programs"
        programs.mkdir(exist_ok=True)
        contents = {
            "python3": FAKE_PYTHON.format(python=sys.executable, directory=programs),
            "torchrun.py": FAKE_TORCHRUN,
            "srun": FAKE_SRUN,
            "scontrol": FAKE_SCONTROL,
            "nvidia-smi": "#!/bin/bash\nexit 9\n",
        }
        for name, content in contents.items():
            if not (programs / name).exists():
                (programs / name).write_text(content)
                (programs / name).chmod(0o755)
        unwanted = ("SLURM", "LLAMATRAIN", "NPROC", "OMP", "CUDA", "PYTHON", "MAX_RESTARTS", "CONTAINER")
        plan = {
            "run_dir": str(self.run_dir),
            "state": self.state,
            "reason": self.reason,
            "attempt": self.attempt,
            "exit": self.exit_status,
            "waits": self.waits,
            "saves_s": self.saves_s,
        }
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(unwanted)},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PLAN": json.dumps(plan),
            "NOTE": str(self.directory / "note"),
            "JOB_STATE": self.job_state,
            **self.environment,
        }
        return subprocess.Popen(
            ["bash", str(self.script), f"run_dir={self.run_dir}", *self.arguments],
            env=environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )

    def run(self) -> tuple[int, str]:
        """To its end: the exit status and what was printed."""
        with self.start() as script:
            output, _ = script.communicate(timeout=PATIENCE_S)
        return script.returncode, output

    def start_and_wait_for_torchrun(self) -> "subprocess.Popen[str]":
        script = self.start()
        self.wait_until_exists(self.directory / "note.ready")
        return script

    def wait_until_exists(self, path: Path) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists():
            assert time.monotonic() < deadline, f"{path.name} did not come"
            time.sleep(0.01)


@pytest.fixture
def on_one_node(tmp_path: Path) -> Launch:
    return Launch(TORCHRUN, tmp_path)


@pytest.fixture
def in_slurm(tmp_path: Path) -> Launch:
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_NNODES": "2"}
    return Launch(SBATCH, tmp_path, environment=job)


# ---------------------------------------------------------------------- the decision


def left(state: str, reason: str | None = None, attempt: str = "slurm-1-0") -> dict[str, Any]:
    return {"state": state, "step": 40, "reason": reason, "attempt": attempt}


@pytest.mark.parametrize(
    ("status", "signalled", "again", "words"),
    [
        (left(PREEMPTED, "control/stop"), True, True, "preempted at step 40 (control/stop)"),
        (left(PREEMPTED, "SIGUSR1"), False, True, "preempted at step 40 (SIGUSR1)"),
        (left(RUNNING), False, True, "crashed at step 40, without a last word"),
        (left(RUNNING, "rank 3 on n7: RuntimeError: no"), False, True, "rank 3 on n7: RuntimeError: no"),
        (left(PREEMPTED, "control/stop"), False, False, "by a person"),
        (left(PREEMPTED, "train.stop_after_step=40"), False, False, "by a person"),
        (left(PREEMPTED, "train.stop_after_step=40"), True, False, "by a person"),
        (left(DONE), True, False, "done at step 40"),
        (left(UNHEALTHY, "loss nan"), True, False, "unhealthy at step 40 (loss nan)"),
        (left(BAD_INPUT, "no data"), True, False, "bad_input at step 40 (no data)"),
        (None, True, False, "before it wrote a status"),
        (left(RUNNING, attempt="slurm-1-9"), True, False, "the one before, slurm-1-9, was running at step 40"),
        (left(PREEMPTED, "SIGUSR1", attempt="slurm-1-9"), True, False, "this attempt ended before it wrote a status"),
    ],
)
def test_a_job_is_started_again_only_from_what_its_own_attempt_left(
    status: dict[str, Any] | None, signalled: bool, again: bool, words: str
) -> None:
    decided, reason = decision(status, "slurm-1-0", signalled=signalled)
    assert decided is again
    assert words in reason


def test_the_decision_is_an_exit_status_and_a_status_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    def ask() -> tuple[int, str]:
        environment = {**os.environ, "LLAMATRAIN_ATTEMPT": "slurm-1-0", "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "launch.requeue", str(tmp_path)]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert ask() == (1, "not requeued: it ended before it wrote a status\n")
    (tmp_path / "status.json").write_text(json.dumps(left(RUNNING)))
    assert ask() == (0, "requeue: crashed at step 40, without a last word\n")
    (tmp_path / "status.json").write_text("{")
    code, printed = ask()
    assert code == 2
    assert "cannot be read" in printed


# ---------------------------------------------------------------------- the scripts as texts


@pytest.mark.parametrize("script", [TORCHRUN, SBATCH], ids=lambda path: path.name)
def test_scripts_are_well_formed(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        unavoidable = "SC1090,SC2329"  # a setup file of the user's; functions that a trap calls
        command = ["shellcheck", "--shell=bash", f"--exclude={unavoidable}", str(script)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout == ""


def test_the_job_asks_for_a_signal_before_its_time_limit_and_may_be_requeued() -> None:
    options = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@300" in options
    assert "#SBATCH --requeue" in options
    assert "#SBATCH --open-mode=append" in options


# ---------------------------------------------------------------------- one node


AWKWARD = ['name=it\'s a "name"', "data.sources.web.path=/a b/$HOME/*"]


def test_every_argument_reaches_torchrun_as_it_was_typed(on_one_node: Launch) -> None:
    on_one_node.arguments = AWKWARD
    on_one_node.environment = {"NPROC_PER_NODE": "2", "MAX_RESTARTS": "5", "OMP_NUM_THREADS": "3"}
    code, output = on_one_node.run()
    assert code == 0, output
    noted = on_one_node.note
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=5", "-m", "llamatrain.train"]
    assert noted["arguments"] == [*options, f"run_dir={on_one_node.run_dir}", *AWKWARD]
    assert noted["threads"] == "3"
    assert output.endswith(f"torchrun.sh: {on_one_node.run_dir}: done at step 7\n")


def test_there_is_a_process_for_every_gpu_that_may_be_used(on_one_node: Launch) -> None:
    listing = "\n".join(f"echo 'GPU {number}: NVIDIA (UUID: x)'" for number in range(4))
    (on_one_node.directory / "programs").mkdir()
    (on_one_node.directory / "programs" / "nvidia-smi").write_text(f"#!/bin/bash\n{listing}\n")
    (on_one_node.directory / "programs" / "nvidia-smi").chmod(0o755)
    on_one_node.run()
    assert "--nproc-per-node=4" in on_one_node.note["arguments"]
    on_one_node.environment = {"CUDA_VISIBLE_DEVICES": "1,3"}
    on_one_node.run()
    assert "--nproc-per-node=2" in on_one_node.note["arguments"]


def test_every_launch_is_an_attempt_of_its_own_also_within_an_allocation(on_one_node: Launch) -> None:
    on_one_node.environment = {"SLURM_JOB_ID": "5"}
    on_one_node.run()
    first = on_one_node.note["attempt"]
    on_one_node.run()
    assert first.startswith("launch-")
    assert on_one_node.note["attempt"] != first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_becomes_a_request_and_the_script_waits_for_the_save(
    on_one_node: Launch, number: signal.Signals
) -> None:
    on_one_node.waits, on_one_node.saves_s, on_one_node.state = True, 0.5, PREEMPTED
    on_one_node.reason = "control/stop"
    script = on_one_node.start_and_wait_for_torchrun()
    script.send_signal(number)
    on_one_node.wait_until_exists(on_one_node.stop_file)
    assert on_one_node.stop_file.read_text() == on_one_node.note["attempt"]
    assert script.poll() is None
    output, _ = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 0
    assert "preempted at step 7 (control/stop)" in output
    assert on_one_node.note["signals"] == []


def test_ctrl_c_asks_first_and_a_second_one_reaches_torchrun(on_one_node: Launch) -> None:
    on_one_node.waits, on_one_node.saves_s, on_one_node.state = True, 1.5, PREEMPTED
    script = on_one_node.start_and_wait_for_torchrun()
    os.killpg(script.pid, signal.SIGINT)  # the whole group, as a terminal does
    on_one_node.wait_until_exists(on_one_node.stop_file)
    time.sleep(0.2)
    os.killpg(script.pid, signal.SIGINT)
    script.communicate(timeout=PATIENCE_S)
    assert script.returncode == 0
    assert on_one_node.note["signals"] == ["SIGINT"]


@pytest.mark.parametrize(
    ("state", "exit_status", "told", "code"),
    [
        (PREEMPTED, 1, "preempted at step 7", 0),  # torchrun was signalled
        (UNHEALTHY, 1, "unhealthy at step 7", 1),
        (RUNNING, 1, "crashed at step 7", 1),
        (None, 1, "ended before it wrote a status", 1),
    ],
)
def test_the_exit_status_says_what_the_run_directory_says(
    on_one_node: Launch, state: str | None, exit_status: int, told: str, code: int
) -> None:
    on_one_node.state, on_one_node.exit_status = state, exit_status
    done, output = on_one_node.run()
    assert told in output
    assert done == code


def test_a_status_of_an_earlier_launch_excuses_nothing(on_one_node: Launch) -> None:
    on_one_node.attempt, on_one_node.exit_status = "launch-long-ago", 1
    code, output = on_one_node.run()
    assert code == 1
    assert "ended before it wrote a status" in output


def test_a_configuration_that_cannot_be_composed_starts_nothing(on_one_node: Launch) -> None:
    on_one_node.arguments = ["model=nine"]
    code, output = on_one_node.run()
    assert code == 2
    assert "model=nine: there is no such choice" in output
    assert not on_one_node.run_dir.exists()


# ---------------------------------------------------------------------- SLURM


def test_all_nodes_meet_at_the_address_of_the_first_with_the_arguments_as_typed(in_slurm: Launch) -> None:
    in_slurm.arguments = AWKWARD
    in_slurm.environment |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_RESTART_COUNT": "2"}
    code, output = in_slurm.run()
    assert code == 0, output
    assert in_slurm.note["arguments"] == [
        "--nnodes=2",
        "--nproc-per-node=8",
        "--max-restarts=3",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.7:23456",
        "--rdzv-id=123456-2",
        "-m",
        "llamatrain.train",
        f"run_dir={in_slurm.run_dir}",
        *AWKWARD,
    ]
    assert in_slurm.note["attempt"] == "slurm-123456-2"
    assert (in_slurm.directory / "note.srun").read_text() == "--kill-on-bad-exit=1\n--wait=60\n"
    assert not in_slurm.requeued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signalled_job_waits_for_the_save_and_is_requeued(in_slurm: Launch, number: signal.Signals) -> None:
    in_slurm.waits, in_slurm.saves_s, in_slurm.state, in_slurm.reason = True, 0.5, PREEMPTED, "control/stop"
    script = in_slurm.start_and_wait_for_torchrun()
    script.send_signal(number)
    in_slurm.wait_until_exists(in_slurm.stop_file)
    assert not in_slurm.requeued
    output, _ = script.communicate(timeout=PATIENCE_S)
    assert in_slurm.requeued, output
    assert in_slurm.note["signals"] == []


@pytest.mark.parametrize(
    ("state", "reason", "exit_status", "job_state", "requeued", "code"),
    [
        (RUNNING, None, 1, "RUNNING", True, 0),
        (RUNNING, None, 1, "COMPLETING", False, 1),  # scancel
        (PREEMPTED, "control/stop", 0, "RUNNING", False, 0),  # a person's request
        (UNHEALTHY, "loss nan", 1, "RUNNING", False, 1),
        (BAD_INPUT, "no data", 1, "RUNNING", False, 1),
        (None, None, 1, "RUNNING", False, 1),
        (None, None, 0, "RUNNING", False, 0),  # train.dry_run=true
    ],
)
def test_only_a_job_that_can_go_on_by_itself_is_requeued(
    in_slurm: Launch,
    state: str | None,
    reason: str | None,
    exit_status: int,
    job_state: str,
    requeued: bool,
    code: int,
) -> None:
    in_slurm.state, in_slurm.reason, in_slurm.exit_status, in_slurm.job_state = state, reason, exit_status, job_state
    done, output = in_slurm.run()
    assert in_slurm.requeued is requeued, output
    assert done == code, output


def test_the_setup_file_is_sourced_here_and_on_the_nodes_and_sees_no_arguments(in_slurm: Launch) -> None:
    setup = in_slurm.directory / "setup.sh"
    setup.write_text('echo "setup with $# arguments"\nOMP_NUM_THREADS=11\nfalse\n')
    in_slurm.environment["LLAMATRAIN_SETUP"] = str(setup)
    code, output = in_slurm.run()
    assert code == 0, output
    assert output.count("setup with 0 arguments") == 2
    assert in_slurm.note["threads"] == "11"


def test_a_setup_file_that_is_missing_ends_the_job(in_slurm: Launch) -> None:
    in_slurm.environment["LLAMATRAIN_SETUP"] = "/nowhere/setup.sh"
    code, output = in_slurm.run()
    assert code == 2
    assert "LLAMATRAIN_SETUP=/nowhere/setup.sh cannot be read" in output


# ---------------------------------------------------------------------- a chain of jobs, a container


@pytest.mark.parametrize(
    ("state", "signalled", "exit_status", "ends", "code"),
    [
        (PREEMPTED, True, 0, False, 0),  # its time is over
        (RUNNING, False, 1, False, 1),  # a crash
        (PREEMPTED, False, 0, True, 0),  # a person's request
        (UNHEALTHY, False, 1, True, 1),
    ],
)
def test_a_job_of_a_chain_is_not_requeued_and_the_next_goes_on_only_if_that_can_help(
    in_slurm: Launch, state: str | None, signalled: bool, exit_status: int, ends: bool, code: int
) -> None:
    in_slurm.environment["LLAMATRAIN_CHAIN"] = "a1"
    in_slurm.state, in_slurm.reason, in_slurm.exit_status, in_slurm.waits = (
        state,
        "control/stop",
        exit_status,
        signalled,
    )
    script = in_slurm.start_and_wait_for_torchrun()
    if signalled:
        script.send_signal(signal.SIGUSR1)
    output, _ = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == code, output
    assert not in_slurm.requeued
    assert ("the next job of the chain is to go on" in output) is not ends

    (in_slurm.directory / "note").unlink()
    in_slurm.environment["SLURM_JOB_ID"] = "123457"
    in_slurm.state, in_slurm.waits, in_slurm.exit_status = DONE, False, 0
    again, output = in_slurm.run()
    assert (in_slurm.directory / "note").exists() is not ends, output
    assert ("nothing to do, the chain has ended" in output) is ends
    assert again == (code if ends else 0)


def test_nodes_work_in_the_container_and_the_batch_shell_outside(in_slurm: Launch) -> None:
    inside = in_slurm.directory / "python inside"
    inside.write_text('#!/bin/bash\ntouch "$NOTE.inside" && exec python3 "$@"\n')
    inside.chmod(0o755)
    container = {"CONTAINER_IMAGE": "docker://a#b", "CONTAINER_MOUNTS": "/a b,/c:/d", "CONTAINER_PYTHON": str(inside)}
    in_slurm.environment |= container
    code, output = in_slurm.run()
    assert code == 0, output
    options = (in_slurm.directory / "note.srun").read_text().splitlines()
    assert options[2:] == [
        "--container-image=docker://a#b",
        f"--container-workdir={in_slurm.directory}",
        "--container-mounts=/a b,/c:/d",
    ]
    assert (in_slurm.directory / "note.inside").exists()
