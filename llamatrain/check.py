"""Check checkpoints whole, every byte of every file. Nothing is changed.

python -m llamatrain.check checkpoint=RUN_OR_STEP_DIRECTORY

Manifest, sizes and SHA-256 of all files, and whether the chunks cover every tensor: what a start checks, which sets a
checkpoint aside that is not whole. Of a run all its checkpoints. Exit status 0: all whole; 3: not, and why.
"""

from pathlib import Path

from llamatrain.cli import run_command
from llamatrain.config.check import CheckConfig, check_check
from llamatrain.errors import CheckpointError


def run(settings: CheckConfig) -> None:
    """Print a line for each checkpoint. Raises CheckpointError if one is not whole."""
    check_check(settings)
    from llamatrain.checkpoint import commit

    assert settings.checkpoint is not None  # checked above
    path = Path(settings.checkpoint)
    of_run = commit.list_steps(path / "checkpoints")
    if not of_run and (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path}: no checkpoint is there yet")
    found = of_run or [path]
    whole, wrong = 0, []
    for checkpoint in found:
        try:
            told = verified(checkpoint)
        except CheckpointError as error:
            if of_run and not checkpoint.exists():
                continue  # the run, at work, has removed it
            told = "NOT WHOLE"
            wrong.append(str(error))
        else:
            whole += 1
        print(f"{checkpoint.name}  {told}", flush=True)
    if wrong:
        raise CheckpointError(f"{len(wrong)} of {len(found)} checkpoints are not whole: {'; '.join(wrong)}")
    if not whole:
        raise CheckpointError(f"{path}: the run, at work, removed each checkpoint while it was read; check again")


def verified(checkpoint: Path) -> str:
    """What a whole checkpoint is, in words. Raises CheckpointError."""
    from llamatrain.checkpoint import commit, store

    manifest = store.open_checkpoint(checkpoint, hashes=False)
    files = manifest["files"]
    commit.verify_files(checkpoint, files)
    size = sum(entry["size"] for entry in files.values())
    return f"whole: {len(files)} files, {size:,} bytes"


def main() -> None:
    run_command(CheckConfig, "commands/check", run, help_text=__doc__)


if __name__ == "__main__":
    main()
