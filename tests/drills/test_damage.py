"""Every kind of byte of every file of a checkpoint changed, files cut, gone, replaced: it is found, the file is named,
the checkpoint before is used, and the run ends as if nothing had been.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from llamatrain.checkpoint.commit import MANIFEST_FILE
from llamatrain.config import RunConfig
from llamatrain.trainer import Trainer
from tests.drills.plugin import Drills
from tests.small_run import assert_same_run, small_config, train_in_process, trainer_for

pytestmark = [pytest.mark.drill, pytest.mark.timeout(7200)]

PROMISE = "found, the file named, the checkpoint before used, the run ends bitwise like the undisturbed one"
SAVED, BEFORE = "step-00000012", 8
PLACES = 12  # bytes that are tried of a stretch of one kind


@dataclass(frozen=True)
class Damage:
    """`change` is done to `file`, of the newest checkpoint."""

    file: str
    what: str
    change: Callable[[Path], None]

    def __str__(self) -> str:
        return f"{self.file}, {self.what}"


def flip(offset: int, mask: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ mask]))

    return change


def cut(length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, length)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to(other: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(other)

    return change


def older(path: Path) -> None:
    """The same file of the checkpoint before."""
    shutil.copy(path.parent.with_name(f"step-{BEFORE:08d}") / path.name, path)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


REPLACED = {
    "gone": Path.unlink,
    "a folder": become_folder,
    "a pipe": become_pipe,
    "a link to nothing": link_to("nothing"),
    "a link to itself": link_to("."),
    "a link to zeros without end": link_to("/dev/zero"),
    "that of the checkpoint before": older,
    "a byte longer": append,
}


def stretches(path: Path) -> Iterator[tuple[str, int, int]]:
    """(kind, first byte, behind the last) of all that a file is made of."""
    content = path.read_bytes()
    if path.name == MANIFEST_FILE:
        text, manifest = content.decode(), json.loads(content)
        assert text.isascii()
        for key in manifest:
            begin = text.index(f'"{key}":')
            value = json.dumps(manifest[key], ensure_ascii=False, separators=(",", ":"))
            yield f"the name {key}", begin, begin + len(key) + 2
            yield f"the value of {key}", begin + len(key) + 3, begin + len(key) + 3 + len(value)
        yield "the end", len(content) - 2, len(content)
        return
    data = 8 + int.from_bytes(content[:8], "little")
    padding = 8 + len(content[8:data].rstrip(b" "))
    yield "the header's length", 0, 8
    yield "the header", 8, padding
    if padding < data:
        yield "the padding", padding, data
    yield "the data", data, len(content)


def damages(checkpoint: Path) -> list[Damage]:
    found = []
    for path in sorted(checkpoint.iterdir()):
        size = path.stat().st_size
        for kind, begin, end in stretches(path):
            places = sorted({begin + i * (end - 1 - begin) // (PLACES - 1) for i in range(PLACES)})
            for number, offset in enumerate(places):
                mask = (1, 128, 42, 7)[number % 4]  # 42 and 7: the last newline becomes a space, or a return
                found.append(Damage(path.name, f"{kind}: byte {offset} xor {mask}", flip(offset, mask)))
        if path.name == MANIFEST_FILE:
            found += [Damage(path.name, f"the last byte xor {mask}", flip(size - 1, mask)) for mask in (7, 42)]
        found += [Damage(path.name, f"cut to {length}", cut(length)) for length in (0, 1, 7, 8, 9, size // 2, size - 1)]
        replaced = dict(REPLACED)
        if path.read_bytes() == (checkpoint.with_name(f"step-{BEFORE:08d}") / path.name).read_bytes():
            del replaced["that of the checkpoint before"]  # of the random state, from which nothing is drawn
        found += [Damage(path.name, what, change) for what, change in replaced.items()]
    return found


@pytest.fixture(scope="module")
def whole(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], RunConfig]:
    """whole(directory): the configuration of the undisturbed run, of twelve steps, in another directory."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"

    def config_in(directory: Path) -> RunConfig:
        return small_config(
            directory,
            sources,
            model={"n_layers": 1},
            train={"global_batch_tokens": 128},
            evaluation={"every_steps": 12, "max_tokens": 64},
            resilience={"preflight": False, "hang_timeout_s": 0},
        )

    def copied(directory: Path) -> RunConfig:
        shutil.copytree(run_dir, directory)
        return config_in(directory)

    train_in_process(config_in(run_dir))
    return copied


def step_gone_back_to(config: RunConfig) -> int:
    with ExitStack() as resources:
        trainer: Trainer = trainer_for(config, resources)
        return trainer.step


def refusals(run_dir: Path) -> list[str]:
    events = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [event["reason"] for event in events if event["event"] == "refused"]


def lost(damage: Damage, config: RunConfig, undisturbed: Path) -> str | None:
    run_dir = Path(config.run_dir)
    damage.change(run_dir / "checkpoints" / SAVED / damage.file)
    if (step := step_gone_back_to(config)) != BEFORE:
        return f"went on from step {step}"
    reasons = refusals(run_dir)
    if len(reasons) != 1 or damage.file not in reasons[0] or SAVED not in reasons[0]:
        return f"told: {reasons}"
    train_in_process(config)
    assert_same_run(undisturbed, run_dir, step=12)
    return None


def test_damaged_checkpoints_are_found_and_the_one_before_is_used(
    whole: Callable[[Path], RunConfig], drills: Drills, tmp_path: Path
) -> None:
    undisturbed = Path(whole(tmp_path / "undisturbed").run_dir)
    points = drills.pick(damages(undisturbed / "checkpoints" / SAVED), sample=60)
    losses = []
    for damage in points:
        try:
            loss = lost(damage, whole(tmp_path / "run"), undisturbed)
        except Exception as error:
            loss = f"{type(error).__name__}: {error}"
        losses += [f"{damage}: {loss}"] if loss else []
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    drills.report(
        "a byte changed, a file cut, gone or replaced in the newest checkpoint",
        PROMISE,
        times=len(points),
        losses=losses,
    )


def test_the_same_in_all_checkpoints_stops_the_run(
    whole: Callable[[Path], RunConfig], drills: Drills, tmp_path: Path
) -> None:
    """Never from the start again, over what there was."""
    config = whole(tmp_path / "run")
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        flip(-1 + (checkpoint / MANIFEST_FILE).stat().st_size // 2, 1)(checkpoint / MANIFEST_FILE)
    try:
        losses = [f"went on from step {step_gone_back_to(config)}"]
    except Exception as error:
        told = "none can be used" in str(error) and MANIFEST_FILE in str(error)
        losses = [] if told else [f"{type(error).__name__}: {error}"]
    drills.report("every checkpoint damaged", "the run stops and names them", times=1, losses=losses)
