"""A small process beside every rank that sees when it comes no further, reports, and ends it. No torch.

It counts the time in which the rank's pulse does not change; time in which it was itself stopped (a suspended job)
does not count. A rank may take hang_timeout_s for a step, or twice as long as its shortest step so far, if that is
more; hang_timeout_at_start_s until it has done two. While it saves, bytes written are progress. Then: the rank's
stacks and last collectives are taken, the rank is stopped, so that what is reported stays true, and a report is put
into the run directory. The watchman of the lowest rank that has reported waits for the others, concludes, and tells:
journal, status, torchrun's error file, stderr. After that all end their ranks.

Whatever may hang as well (the run directory) is done in a thread that is waited for so long and no longer.
"""

import json
import mmap
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatrain.files import write_json_atomically
from llamatrain.process import write_error_file
from llamatrain.resilience.hang import STOPPED, LastSign, Report, add_stacks, judge
from llamatrain.resilience.pulse import SIZE, Beat, read_beat
from llamatrain.run_directory import SAVING, RunDirectory

END, STANDSTILL, ASK = "end", "standstill", b"collectives"  # words between a rank and its watchman
CONCLUSION = "conclusion.json"
RAN_OUT, OTHERS = "a collective ran out of time", "another rank reports a hang"  # why a rank was looked at

LONGEST_TICK_S = 1.0  # between two looks at the pulse
LOOK_EVERY_S = 5.0  # for another rank's report: a question to a file system that others use too
SIGN_EVERY_S = 60.0  # a sign of life in the run directory, for when the node is gone
ANSWER_S = 3.0  # for stacks and collectives
COLLECT_S = 30.0  # for the other ranks' reports, which a file system may show late
WRITING_BYTES = 2**20  # less, while a checkpoint is saved, is no progress
WRITE_S = 30.0  # for the run directory to take something


@dataclass(frozen=True)
class Post:
    """What a watchman is to watch."""

    rank: int
    world_size: int
    pid: int
    run_dir: str
    hang: str
    attempt: str
    limit_s: float
    start_limit_s: float
    stack_signal: int
    descriptors: tuple[int, int, int]  # pulse, stacks, collectives

    @property
    def reports(self) -> Path:
        return Path(self.run_dir) / self.hang


class Clock:
    """How long the pulse has stood still, and how long it may."""

    def __init__(self, limit_s: float, start_limit_s: float) -> None:
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self._last = Beat(0, 0, 0, 0.0, "")
        self._in_step_s = 0.0
        self._shortest_step_s = 0.0
        self.silent_s = 0.0

    @property
    def tick_s(self) -> float:
        """Between two looks."""
        shortest = min(s for s in (self._limit_s, self._start_limit_s) if s)
        return min(LONGEST_TICK_S, shortest / 20)

    def look(self, beat: Beat, elapsed_s: float, *, writes: bool = False) -> None:
        """Take in the pulse as it is `elapsed_s` after the last look; `writes`: a checkpoint grows meanwhile."""
        elapsed_s = min(elapsed_s, 5 * self.tick_s)  # more: this process did not run either
        self.silent_s += elapsed_s
        self._in_step_s += elapsed_s
        last, self._last = self._last, beat
        if writes or beat.beats != last.beats:
            self.silent_s = 0.0
        if beat.steps_done > last.steps_done:
            took = self._in_step_s / (beat.steps_done - last.steps_done)
            if last.steps_done:  # the first step is not like the others
                self._shortest_step_s = min(took, self._shortest_step_s or took)
            self._in_step_s = 0.0

    @property
    def limit_s(self) -> float:
        """How long the rank may stand still now; 0: for ever."""
        if self._last.steps_done < 2:
            return self._start_limit_s
        return max(self._limit_s, 2 * self._shortest_step_s) if self._limit_s else 0.0

    @property
    def expired(self) -> bool:
        return 0 < self.limit_s <= self.silent_s


class Watchman:
    """Watches one rank, whose child it is."""

    def __init__(self, post: Post) -> None:
        self.post = post
        pulse, self._stacks, self._answers = post.descriptors
        self._pulse = mmap.mmap(pulse, SIZE)
        self._clock = Clock(post.limit_s, post.start_limit_s)
        self._heard = b""
        self._written = 0  # bytes, by the rank
        self._alone = post.world_size == 1
        self._others_report = False

    def watch(self) -> None:
        """Until the rank ends, or stands still for too long."""
        if not self._alone:
            threading.Thread(target=self._look_around, daemon=True).start()
        last = time.monotonic()
        while True:
            line = self._hear(self._clock.tick_s)
            if line == END or os.getppid() != self.post.pid:
                return
            now = time.monotonic()
            beat = read_beat(self._pulse)
            self._clock.look(beat, now - last, writes=beat.phase == SAVING and self._writes())
            last = now
            if line is not None and line.startswith(STANDSTILL):
                self._report(f"{RAN_OUT} ({line.removeprefix(STANDSTILL).strip()})")
            elif self._clock.expired:
                self._report(f"no progress for {self._clock.limit_s:.0f} s")
            elif self._others_report:
                self._report(OTHERS)
            else:
                continue
            return

    def _writes(self) -> bool:
        """Whether the rank has written something worth it since this was last said."""
        found = re.search(r"^wchar: (\d+)", of_process(self.post.pid, "io"), re.MULTILINE)
        if found is None or int(found[1]) - self._written < WRITING_BYTES:
            return False
        self._written = int(found[1])
        return True

    def _hear(self, patience_s: float) -> str | None:
        """The next line from the rank; None if none comes in time, END if the rank is gone."""
        deadline = time.monotonic() + patience_s
        while b"\n" not in self._heard:
            ready, _, _ = select.select([0], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            more = os.read(0, 65536)
            if not more:
                return END
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line.decode(errors="replace")

    def _look_around(self) -> None:
        """Leave signs of life in the run directory, look there for others' reports; a thread, as it may hang."""
        post, signed_at = self.post, -SIGN_EVERY_S
        while True:
            with suppress(OSError):
                self._others_report = self._others_report or post.reports.is_dir()
                if time.monotonic() - signed_at >= SIGN_EVERY_S:
                    signed_at = time.monotonic()
                    self._leave_sign()
            time.sleep(LOOK_EVERY_S)

    def _leave_sign(self) -> None:
        beat, path = read_beat(self._pulse), sign_path(self.post, self.post.rank)
        sign = LastSign(socket.gethostname(), self.post.pid, beat.step, beat.phase, time.time())
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"hang": self.post.hang, "sign": sign}))
        temporary.replace(path)

    # ------------------------------------------------------------------ after a hang

    def _report(self, why: str) -> None:
        """Look at the rank, write what is found, conclude with the others, and end it."""
        report, stacks = self._examine(why)
        if not self._alone:
            os.kill(self.post.pid, signal.SIGSTOP)
        done = within(WRITE_S, lambda: self._write(report, stacks))
        if done:
            done = within(4 * COLLECT_S, self._conclude_together)
        if not done:  # the run directory is what hangs: this rank's story is all there is
            message = f"the run hangs, and {self.post.reports} cannot be written: {judge([report], {}).message}"
            self._tell(f"{message}\n{stacks}")
            within(WRITE_S, lambda: self._note(report.step, message))
        if os.getppid() == self.post.pid:
            os.kill(self.post.pid, signal.SIGKILL)

    def _examine(self, why: str) -> tuple[Report, str]:
        """What can be known of the rank, and its stacks as text."""
        pid, beat = self.post.pid, read_beat(self._pulse)
        report = Report(
            rank=self.post.rank,
            host=socket.gethostname(),
            pid=pid,
            step=beat.step,
            phase=beat.phase,
            last_beat=beat.time,
            silent_s=self._clock.silent_s,
            why=why,
        )
        report.state = of_process(pid, "stat").rpartition(")")[2][1:2] or "?"
        report.kernel_function = of_process(pid, "wchan").strip("0\n")
        stopped = report.state in STOPPED
        if not stopped:
            report.collectives = [] if self._alone else self._ask_collectives()
            if why.startswith(RAN_OUT):  # the recorder has it as done
                for entry in {entry["group"]: entry for entry in report.collectives or ()}.values():
                    entry["done"] = False
        elif not self._alone:
            within(COLLECT_S / 2, self._wait_for_others)  # who by then stand: this one is about to go on
        text = self._take_stacks(stopped=stopped)
        add_stacks(report, text)
        return report, text

    def _take_stacks(self, *, stopped: bool) -> str:
        """Have the rank's signal handler write them. If its main thread cannot be reached, any other will do.

        A rank that was stopped goes on until they are written: its fate is sealed, and the others are stopped by
        now. As the signal is for the main thread, that does nothing before it has written them.
        """
        pid, number = self.post.pid, self.post.stack_signal
        signal_thread(pid, pid, number)
        if stopped:
            os.kill(pid, signal.SIGCONT)
        if not self._stacks_written():
            with suppress(OSError):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    signal_thread(pid, int(thread), number)
                    if self._stacks_written(0.5):
                        break
        return os.pread(self._stacks, os.fstat(self._stacks).st_size, 0).decode(errors="replace")

    def _stacks_written(self, patience_s: float = ANSWER_S) -> bool:
        """Wait until they are there and grow no more."""
        deadline, size = time.monotonic() + patience_s, 0
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, size = size, os.fstat(self._stacks).st_size
            if 0 < size == before:
                return True
        return False

    def _ask_collectives(self) -> list[dict[str, Any]] | None:
        os.write(1, ASK + b"\n")
        deadline = time.monotonic() + ANSWER_S
        while (line := self._hear(max(0.0, deadline - time.monotonic()))) is not None and line != END:
            word, _, size = line.partition(" ")
            if word == ASK.decode():
                answer: list[dict[str, Any]] = json.loads(os.pread(self._answers, int(size), 0))
                return answer
        return None

    def _wait_for_others(self) -> None:
        while len(list(self.post.reports.glob("rank*.json"))) < self.post.world_size - 1:
            time.sleep(0.2)

    def _write(self, report: Report, stacks: str) -> None:
        directory = self.post.reports
        directory.mkdir(exist_ok=True)
        (directory / f"rank{report.rank:05d}.stacks.txt").write_text(stacks)
        write_json_atomically(directory / f"rank{report.rank:05d}.json", asdict(report))

    def _conclude_together(self) -> None:
        """Conclude if this is the lowest rank that has reported, when all have or could have; else wait for that."""
        post, began = self.post, time.monotonic()
        written = post.reports / CONCLUSION
        while not written.exists():
            waited = time.monotonic() - began
            if post.rank == 0 or waited > COLLECT_S:
                present = reports_in(post.reports)
                place = sorted(present).index(post.rank)
                everybody = len(present) == post.world_size
                if place == 0 and (everybody or waited > COLLECT_S):
                    return self._conclude(present)
                if waited > 3 * COLLECT_S:
                    return None
            time.sleep(0.5)
        write_error_file(json.loads(written.read_text())["message"])

    def _conclude(self, reports: dict[int, Report]) -> None:
        """Judge, and tell whoever has to know."""
        post = self.post
        missing = {rank: read_sign(post, rank) for rank in range(post.world_size) if rank not in reports}
        found = judge(list(reports.values()), missing)
        why = next((report.why for report in reports.values() if report.why != OTHERS), OTHERS)
        message = f"the run hangs ({why}): {found.message}; stacks and collectives: {post.reports}"
        self._note(reports[post.rank].step, message)
        self._tell(message)
        content = {"message": message, "guilty": found.guilty, "reports": len(reports), "time": time.time()}
        write_json_atomically(post.reports / CONCLUSION, content)

    def _note(self, step: int, message: str) -> None:
        RunDirectory(self.post.run_dir, leads=False, attempt=self.post.attempt).note_hang(step, message)

    def _tell(self, message: str) -> None:
        with suppress(OSError):
            os.write(2, f"error: {message}\n".encode())
        with suppress(OSError):
            write_error_file(message.partition("\n")[0])


def within(seconds: float, act: Callable[[], None]) -> bool:
    """Call something that may hang; whether it came to its end in time."""
    done = threading.Event()

    def call() -> None:
        try:
            act()
            done.set()
        except Exception as error:
            os.write(2, f"the watchdog: {error}\n".encode())

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return done.is_set()


def signal_thread(pid: int, thread: int, number: int) -> None:
    """To one thread of a process; its main one has the process' number."""
    import ctypes  # not before it is needed

    ctypes.CDLL(None).tgkill(pid, thread, number)


def of_process(pid: int, file: str) -> str:
    """A file of /proc/PID, "" if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    except OSError:
        return ""


def reports_in(directory: Path) -> dict[int, Report]:
    """By rank."""
    found = (Report(**json.loads(path.read_text())) for path in directory.glob("rank*.json"))
    return {report.rank: report for report in found}


def sign_path(post: Post, rank: int) -> Path:
    return Path(post.run_dir) / "logs" / f"rank{rank:05d}.sign.json"


def read_sign(post: Post, rank: int) -> LastSign | None:
    """The last sign of life that a rank of this launch left."""
    try:
        found = json.loads(sign_path(post, rank).read_text())
        return LastSign(*found["sign"]) if found["hang"] == post.hang else None
    except (OSError, ValueError):
        return None


def main() -> None:
    values = json.loads(sys.argv[1])
    Watchman(Post(**{**values, "descriptors": tuple(values["descriptors"])})).watch()
    os._exit(0)  # a thread may be in a file system that does not answer


if __name__ == "__main__":
    main()
