"""Where records go after metrics.jsonl: the console and Weights & Biases. Neither can stop or slow the run."""

import contextlib
import logging
import os
import queue
import threading
import uuid
from pathlib import Path
from typing import Any, Protocol

from llamatrain.config import LoggingConfig, RunConfig
from llamatrain.files import write_bytes_atomically
from llamatrain.observe.records import Record

log = logging.getLogger(__name__)

WANDB_QUEUE = 1000  # records waiting for a slow server; beyond that they are dropped and counted
WANDB_FINISH_S = 30.0


class Sink(Protocol):
    """Takes records."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def duration(seconds: float) -> str:
    """Seconds as people read them: 0.4s, 42s, 3m05s, 7h12m, 4d03h."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


class Console:
    """One line per record: progress, loss, rate, speed, memory, time to the end."""

    def __init__(self, *, total_steps: int) -> None:
        self._total = total_steps

    def write(self, record: Record) -> None:
        line = self.tasks_line
        if "train/loss" in record:
            line = self.training_line
        elif "eval/validation/loss" in record:
            line = self.validation_line
        print(line(record), flush=True)

    def training_line(self, record: Record) -> str:
        step = record["step"]
        eta = (self._total - step) * record["perf/step_ms"] / 1e3
        fields = [
            f"step {step:>{len(str(self._total))}}/{self._total} {100 * step // self._total:>3}%",
            f"loss {record['train/loss']:.4f}",
            f"lr {record['train/lr']:.2e}",
            f"grad {record['train/grad_norm']:.3f}",
            f"{record['perf/tokens_per_s_per_device']:,.0f} tok/s/device",
            f"mfu {record['perf/mfu']:.1%}" if "perf/mfu" in record else "",
            f"wait {record['perf/data_wait_ms']:.1f}ms",
            f"mem {record['perf/memory_gib']:.2f}GiB",
            f"eta {duration(eta)}",
        ]
        return "  ".join(field for field in fields if field)

    def validation_line(self, record: Record) -> str:
        losses = [
            f"{key.split('/')[1].removeprefix('validation').removeprefix('.') or 'all'} {value:.4f}"
            for key, value in record.items()
            if key.startswith("eval/validation") and key.endswith("/loss")
        ]
        bits = record["eval/validation/bits_per_byte"]
        return f"step {record['step']}  validation loss: {', '.join(losses)}  bits per byte: {bits:.4f}"

    def tasks_line(self, record: Record) -> str:
        """Of each task the metric that it names first."""
        first: dict[str, str] = {}
        for key, value in record.items():
            prefix, _, rest = key.partition("/")
            task, _, metric = rest.partition("/")
            if prefix == "eval":
                first.setdefault(task, f"{task} {value:.4f} ({metric})")
        return f"step {record['step']}  {', '.join(first.values())}"

    def close(self) -> None:
        pass


def open_sinks(config: RunConfig, run_dir: Path) -> list[Sink]:
    """What a run's settings ask for."""
    sinks: list[Sink] = [Console(total_steps=config.total_steps)]
    if config.logging.wandb != "off":
        sinks.append(Wandb(config.logging, name=config.name, directory=run_dir, config=config.as_dict()))
    return sinks


def stored_run_id(path: Path) -> str:
    """The run's wandb id, made once and kept in the run directory, so that a resumed run goes on in the same plot."""
    if not path.exists():
        write_bytes_atomically(path, uuid.uuid4().hex[:12].encode())
    return path.read_text().strip()


class Wandb:
    """Hands records to wandb in a thread of its own; its failures are told once and end it, not the run.

    The x-axis is `tokens`, so a run resumed at an earlier step draws over itself.
    """

    def __init__(self, settings: LoggingConfig, *, name: str, directory: Path, config: dict[str, Any]) -> None:
        self._queue: queue.Queue[Record | None] = queue.Queue(WANDB_QUEUE)
        self._dropped = 0
        run_id = stored_run_id(directory / "wandb_id")
        arguments = {
            "project": settings.wandb_project,
            "entity": settings.wandb_entity,
            "mode": settings.wandb,
            "name": name,
            "id": run_id,
            "resume": "allow",
            "dir": str(directory),
            "config": config,
        }
        self._thread = threading.Thread(target=self._work, args=(arguments,), name="wandb", daemon=True)
        self._thread.start()

    def _work(self, arguments: dict[str, Any]) -> None:
        os.environ.pop("SLURM_JWT", None)  # wandb keeps, and sends, every variable of SLURM's: this one is a password
        try:
            import wandb

            run = wandb.init(**arguments)
            run.define_metric("tokens")
            run.define_metric("*", step_metric="tokens")
            while (record := self._queue.get()) is not None:
                run.log(record)
            run.finish()
        except Exception as error:  # whatever wandb raises, training goes on
            log.warning("wandb is off from here on, metrics.jsonl has everything: %s", error)

    def write(self, record: Record) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            if self._dropped == 0:
                log.warning("wandb does not keep up; records are dropped there, metrics.jsonl has everything")
            self._dropped += 1

    def close(self) -> None:
        """Let wandb finish what it has, for at most WANDB_FINISH_S seconds."""
        if self._dropped:
            log.warning("wandb missed %d records; metrics.jsonl has them", self._dropped)
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):  # then it hangs, and the thread is left behind
                self._queue.put(None, timeout=WANDB_FINISH_S)
                self._thread.join(WANDB_FINISH_S)
            if self._thread.is_alive():
                log.warning("wandb did not finish within %.0f s; the run ends without it", WANDB_FINISH_S)
