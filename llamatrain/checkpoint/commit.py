"""Checkpoint directories: made whole or not at all, checked, listed, pruned. No torch.

`checkpoints/step-00001234/` holds safetensors files and `checkpoint.json`. Everything is written into a temporary
directory, synced, and renamed; the manifest is written last, so a directory with a manifest is a checkpoint and
one without is not. The manifest carries size and SHA-256 of every file and a hash of itself. Which checkpoint is
the newest is found by looking, never by a pointer file. No pickle is written or read.

Each rank writes files of its own and seals them; one rank begins and commits. What the ranks do in between, and how
they agree, is `store`'s.
"""

import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llamatrain.errors import CheckpointError, ConfigError
from llamatrain.files import fsync_path, sha256_of_file, sha256_of_json, write_bytes_atomically

FORMAT = "llamatrain-checkpoint"
VERSION = 2
MANIFEST_FILE = "checkpoint.json"
TEMPORARY_PREFIX = ".unfinished-"
DELETED_PREFIX = ".deleted-"
REFUSED_PREFIX = "refused-"
LARGEST_MANIFEST = 512 << 20  # bytes; 65B on 2,048 ranks of a mesh with two axes takes 160 MB
FOREIGN_FILES = ("config.json", "params.json", "consolidated.00.pth")  # of Hugging Face's directories, and of Meta's
STEP_NAME = re.compile(r"step-([0-9]{8,18})")

Manifest = dict[str, Any]
FileEntry = dict[str, Any]  # size and sha256


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is one."""
    return root / (TEMPORARY_PREFIX + step_name(step))


def begin(root: Path, step: int) -> Path:
    """A fresh temporary directory for the checkpoint of `step`."""
    temporary = temporary_directory(root, step)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def seal(path: Path) -> FileEntry:
    """Sync a file that is written to its end; returns its size and SHA-256, read back."""
    fsync_path(path)
    return {"size": path.stat().st_size, "sha256": sha256_of_file(path)}


def commit(temporary: Path, content: Manifest, files: Mapping[str, FileEntry]) -> Path:
    """Turn a temporary directory whose `files` are all sealed into a checkpoint: write the manifest, rename.

    `content` is the manifest without the fields that describe the format and the files; this adds them. Raises
    CheckpointError for a file that whoever sealed it sees and this process does not, and where another checkpoint of
    this step is, which stays.
    """
    for name, entry in files.items():
        if (temporary / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"{temporary / name}: it has another size than where it was written")
    manifest = {"format": FORMAT, "version": VERSION, **content, "files": dict(files)}
    sha256 = sha256_of_json(manifest)
    write_bytes_atomically(temporary / MANIFEST_FILE, as_written(manifest, sha256))
    final = temporary.with_name(temporary.name.removeprefix(TEMPORARY_PREFIX))
    if not final.exists():
        os.rename(temporary, final)
    elif manifest_hash(final) == sha256:  # by a try before, of which only the last sync failed
        shutil.rmtree(temporary)
    else:
        raise CheckpointError(f"{final}: another checkpoint of this step is there; move it away")
    fsync_path(final.parent)
    return final


def as_written(manifest: Manifest, sha256: str) -> bytes:
    """The manifest as it is written, with its own hash: the same bytes for the same content."""
    text = json.dumps({**manifest, "manifest_sha256": sha256}, ensure_ascii=False, separators=(",", ":")) + "\n"
    return text.encode(errors="backslashreplace")  # half a surrogate pair, as JSON escapes it


def list_steps(root: Path) -> list[Path]:
    """Whatever is named after a step, newest first; damaged, it need not be a checkpoint any more."""
    if not root.is_dir():
        return []
    steps = {int(match.group(1)): path for path in root.iterdir() if (match := STEP_NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, newest first."""
    return [path for path in list_steps(root) if (path / MANIFEST_FILE).is_file()]


def find_checkpoint(path: Path, *, setting: str = "checkpoint") -> Path:
    """A checkpoint directory itself, or the newest of a run's or an import's. Raises ConfigError, naming the setting.

    Of another program's files the message says how they are made into an import.
    """
    try:
        if (path / MANIFEST_FILE).is_file():
            return path
        if checkpoints := list_checkpoints(path / "checkpoints"):
            return checkpoints[0]
        there, foreign = path.exists(), any((path / name).is_file() for name in FOREIGN_FILES)
    except OSError as error:
        raise ConfigError(f"{setting}={path}: cannot be read ({error.strerror})") from None
    if not there:
        raise ConfigError(f"{setting}={path}: there is no such directory")
    if foreign:
        raise ConfigError(
            f"{setting}={path}: these are another program's files; python -m llamatrain.convert input={path} "
            f"output=DIRECTORY to=llamatrain makes what {setting}=DIRECTORY takes"
        )
    raise ConfigError(f"{setting}={path}: neither a checkpoint nor a run directory with one")


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def delete(checkpoint: Path) -> None:
    """Remove a checkpoint; renamed first, so that a crash leaves none that is half there."""
    doomed = checkpoint.with_name(DELETED_PREFIX + checkpoint.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def clean(root: Path) -> None:
    """Remove what a crash left unfinished or half deleted. Only the process that holds the run's lock may."""
    if root.is_dir():
        for path in root.iterdir():
            if path.is_dir() and path.name.startswith((TEMPORARY_PREFIX, DELETED_PREFIX)):
                shutil.rmtree(path)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that was refused, so that it counts no more among the steps; returns where it is.

    Left in place it would pass for the newest, and pruning would delete the good ones behind it.
    """
    names = (f"{REFUSED_PREFIX}{checkpoint.name}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    os.rename(checkpoint, aside)
    return aside


def prune(root: Path, *, keep_last: int, keep_every_steps: int) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints and those at multiples of `keep_every_steps` (0: none)."""
    doomed = [
        checkpoint
        for checkpoint in list_checkpoints(root)[keep_last:]
        if not (keep_every_steps and step_of(checkpoint) % keep_every_steps == 0)
    ]
    for checkpoint in doomed:
        delete(checkpoint)
    return doomed


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, its own hash, its step and its names of files checked. Raises CheckpointError.

    Only plain names ending in .safetensors are accepted: nothing else is ever opened. In a directory named after a
    step the manifest must be of that step: renamed, an old checkpoint would pass for the newest.
    """
    path = checkpoint / MANIFEST_FILE
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: no file")
        if status.st_size > LARGEST_MANIFEST:
            raise CheckpointError(f"{path}: larger than any manifest this program writes")
        content = path.read_bytes()
        manifest = json.loads(content.decode())
        recorded = manifest.pop("manifest_sha256", None) if isinstance(manifest, dict) else None
        sha256 = sha256_of_json(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint}: no {MANIFEST_FILE} there, so it is not a checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the manifest cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a {FORMAT} manifest")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path}: schema version {manifest.get('version')}; this program reads version {VERSION}")
    if recorded != sha256:
        raise CheckpointError(f"{path}: the manifest was altered (its own hash does not fit)")
    if content != as_written(manifest, sha256):
        raise CheckpointError(f"{path}: the manifest was altered (it says the same, otherwise than it was written)")
    step = manifest.get("step")
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path}: the manifest's step is {step!r}")
    if (match := STEP_NAME.fullmatch(checkpoint.name)) and int(match[1]) != step:
        raise CheckpointError(
            f"{path}: the manifest is of step {step}: the directory was renamed, or the file moved here"
        )
    if not isinstance(manifest.get("files"), dict):
        raise CheckpointError(f"{path}: the manifest lists no files")
    for name in manifest["files"]:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{checkpoint}: the manifest names {name!r}; a checkpoint holds only .safetensors files, "
                "and nothing else is opened"
            )
    return manifest


def manifest_hash(checkpoint: Path) -> str:
    """What tells a checkpoint from every other: the hash that its manifest carries, checked. Raises CheckpointError."""
    return sha256_of_json(read_manifest(checkpoint))


def verify_files(checkpoint: Path, files: Mapping[str, FileEntry]) -> None:
    """Compare files with their hashes, as many at once as there are cores. Raises CheckpointError naming the first."""
    with ThreadPoolExecutor() as pool:  # hashing is done without Python's lock
        hashed = pool.map(lambda name: verify_file(checkpoint, name, files[name]), files)
        for _ in tqdm(
            hashed, total=len(files), desc=f"checking {checkpoint.name}", unit="file", leave=False, disable=None
        ):
            pass


def verify_file(checkpoint: Path, name: str, entry: FileEntry, *, hashes: bool = True) -> None:
    """Check the size (and SHA-256) of a file the manifest names. Raises CheckpointError naming the file."""
    path = checkpoint / name
    if not isinstance(entry, dict) or not entry.keys() >= {"size", "sha256"}:
        raise CheckpointError(f"{path}: the manifest does not say its size and SHA-256")
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise CheckpointError(f"{path}: named in the manifest but not there") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise CheckpointError(f"{path}: named in the manifest and no file")
    size = status.st_size
    if size != entry["size"]:
        raise CheckpointError(f"{path}: {size} bytes where the manifest says {entry['size']}; it is truncated")
    try:
        altered = hashes and sha256_of_file(path) != entry["sha256"]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if altered:
        raise CheckpointError(f"{path}: its SHA-256 is not the manifest's; its content was altered")
