"""Preparations that are killed again and again end with the bytes of one that nobody disturbed."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.audit import AuditSettings, audit
from data_tools.engine.outputs import HashedFile
from data_tools.prepare import prepare
from tests.data.preparing import files_of, prepared, settings_for, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

ROOT = Path(__file__).parent.parent.parent
KILLED = 137


def _run_until(calls_left: int, corpus: Path, output: Path, **changes: Any) -> bool:
    """Prepare in a forked process that vanishes before its n-th call that writes; whether it came to the end."""
    child = os.fork()
    if child == 0:
        left = [calls_left]

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(KILLED)
                return function(*arguments, **keywords)

            return call

        code = 1
        try:
            os.replace, os.fsync, os.unlink = counted(os.replace), counted(os.fsync), counted(os.unlink)
            HashedFile.write = counted(HashedFile.write)  # type: ignore[method-assign]
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            prepare(settings_for(corpus, output, **changes))
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == 0


@pytest.mark.parametrize("longest", [4, 40])
def test_killed_before_any_call_that_writes(tmp_path: Path, longest: int) -> None:
    corpus = write_corpus(tmp_path / "in", files=4, documents=10)
    changes: dict[str, Any] = {"near_duplicates": True, "unit_bytes": 1, "memory_bytes": 2000}
    whole = files_of(prepared(corpus, tmp_path / "whole", **changes))
    output = tmp_path / "out"
    generator = random.Random(longest)
    kills = 0
    # Of 4 calls none may be enough for a unit, which begins anew each time: so a long breath now and then.
    while not _run_until(generator.randint(0, longest) if kills % 3 else 40, corpus, output, **changes):
        kills += 1
        assert kills < 500
    assert kills > 5
    assert files_of(output) == whole
    audit(AuditSettings(output=str(output), inputs=True))


def test_killed_with_all_its_processes_at_any_moment(tmp_path: Path, tiny_tokenizer: Path) -> None:
    corpus = write_corpus(tmp_path / "in", files=12, documents=400)
    output = tmp_path / "out"
    program = (
        "import sys; from pathlib import Path; from tests.data.preparing import prepared; "
        "prepared(Path(sys.argv[1]), Path(sys.argv[2]), workers=2, tokenizer=sys.argv[3], "
        "tokenize={'shard_tokens': 20_000})"
    )
    command = [sys.executable, "-c", program, str(corpus)]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), str(tiny_tokenizer)], cwd=ROOT, check=True, capture_output=True)
    took, whole = time.monotonic() - began, files_of(tmp_path / "whole")
    generator = random.Random(0)
    patience, kills = 0.3 * took, 0
    while True:
        process = subprocess.Popen(
            [*command, str(output), str(tiny_tokenizer)], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
        )
        try:
            code = process.wait(timeout=patience * generator.uniform(0.8, 1.2))
        except subprocess.TimeoutExpired:
            # half of the time the driver alone: its workers must notice, and must not spoil what comes after
            os.kill(process.pid, signal.SIGKILL) if kills % 2 else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills, patience = kills + 1, patience * 1.1
            continue
        assert code == 0
        break
    assert kills >= 2
    _until_alone(process.pid)
    assert files_of(output) == whole
    audit(AuditSettings(output=str(output), inputs=True))
    print(f"{kills} kills")


def _until_alone(group: int) -> None:
    """Until no process of the last session is left."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("processes were left behind")
