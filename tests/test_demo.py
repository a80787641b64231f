"""The demo's own part: its commands are valid, and it fails when the model has learned too little."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launch import demo
from launch.stages import leave_if_stopped


def records(loss: float) -> list[dict[str, Any]]:
    tasks = ("validation", "validation.code", "validation.docs")
    return [
        {"step": step}
        | {
            f"eval/{task}/{metric}": value
            for task in tasks
            for metric, value in (("loss", reached), ("unigram_entropy", 6.0), ("bits_per_byte", reached / 3))
        }
        for step, reached in ((0, 8.3), (9, loss))
    ]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A demo whose commands are only noted, in a directory of its own; returns what was to run."""
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "run_stage", ran.append)
    monkeypatch.setattr(demo, "leave_if_stopped", lambda *_: None)
    demo.RUN.mkdir(parents=True)
    return ran


def write_records(loss: float) -> None:
    lines = [{"step": 5, "train/loss": 5.0}, *records(loss)]
    (demo.RUN / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_it_goes_from_raw_text_to_samples(finished: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    write_records(4.5)
    demo.main()
    assert [stage[0].rpartition(".")[2] for stage in finished] == [
        "stdlib_corpus", "train_tokenizer", "tokenize_shards", "tokenize_shards", "train", "generate",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"both +8\.3000 +4\.5000 +6\.0000 +1\.5000", printed)
    for place in ("runs/demo/checkpoints/", "runs/demo-data/", "metrics.jsonl"):
        assert place in printed


def test_it_fails_when_the_model_learned_too_little(finished: list[list[str]]) -> None:
    write_records(4.9)
    with pytest.raises(SystemExit, match=r"the model ends 1\.100 nats under the unigram entropy, less than 1\.2"):
        demo.main()


@pytest.mark.parametrize(("state", "leaves"), [("done", False), ("preempted", True)])
def test_it_leaves_where_training_was_stopped(
    state: str, leaves: bool, finished: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (demo.RUN / "status.json").write_text(json.dumps({"state": state, "step": 7, "reason": "SIGINT"}))
    if leaves:
        with pytest.raises(SystemExit):
            leave_if_stopped(demo.RUN, "make demo")
        assert "stopped at step 7 (SIGINT); make demo goes on from there" in capsys.readouterr().out
    else:
        leave_if_stopped(demo.RUN, "make demo")
