"""All sources from raw dumps to a trained model, by one command: inputs that the test writes, and real samples."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.from_raw import FromRawSettings, check_begun, from_raw, stages
from llamatrain.errors import ConfigError
from tests.raw_samples import SEVEN, real_samples, written_samples
from tests.real_text import shared_data
from tests.small_run import metrics, status

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (None, "no such directory"),
        ([], "no source in it; name a folder wikipedia, c4"),
        (["wikipedia", "wiki"], "wiki: not a source; name the folders after wikipedia, c4"),
        (["common_crawl"], "a language model of Wikipedia grades common_crawl: add a folder wikipedia"),
        (["c4", "c4_from_crawl"], "are the same source; leave one"),
    ],
)
def test_what_cannot_be_prepared_is_refused(folders: list[str] | None, message: str, tmp_path: Path) -> None:
    for folder in folders or ():
        (tmp_path / "raw" / folder).mkdir(parents=True)
    if folders == []:
        (tmp_path / "raw").mkdir()
    with pytest.raises(ConfigError, match=message):
        from_raw(FromRawSettings(raw=str(tmp_path / "raw"), output=str(tmp_path / "out")))


def test_every_source_is_audited_before_it_is_used(tmp_path: Path) -> None:
    for source in ("books", "wikipedia"):
        (tmp_path / source).mkdir()
    settings = FromRawSettings(raw=str(tmp_path), output="out")
    commands = [stage[0].partition(".")[2] for stage in stages(settings)]
    assert commands == ["prepare", "audit"] * 2 + ["train_tokenizer"] + ["prepare", "audit"] * 2 + ["mix", "train"]


def test_an_output_within_raw_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw" / "books").mkdir(parents=True)
    for output in ("raw", "raw/out"):
        with pytest.raises(ConfigError, match=r"output=.*raw"):
            from_raw(FromRawSettings(raw=str(tmp_path / "raw"), output=str(tmp_path / output)))


def test_an_output_that_was_begun_otherwise_is_refused(tmp_path: Path) -> None:
    begun = {"steps": 200, "vocab_size": 4096}
    check_begun(tmp_path / "out", begun)
    check_begun(tmp_path / "out", begun)
    for changes, message in (({"vocab_size": 1000}, "vocab_size=1000: .* with 4096; give that, or another output"),
                             ({"steps": 20}, "steps=20: .* with 200; give that or more, or")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            check_begun(tmp_path / "out", begun | changes)
    check_begun(tmp_path / "out", begun | {"steps": 300})


def test_a_source_that_keeps_nothing_ends_it_before_the_next(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for source in ("books", "arxiv"):
        (tmp_path / "raw" / source).mkdir(parents=True)
    (tmp_path / "raw" / "books" / "a.txt").write_text("")
    with pytest.raises(SystemExit):
        from_raw(FromRawSettings(raw=str(tmp_path / "raw"), output=str(tmp_path / "out")))
    told = capfd.readouterr()
    assert "source books: 0 documents kept, and min_documents=1 (clean: dropped " in told.err
    assert "source=arxiv" not in told.out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("samples", [written_samples, real_samples])
def test_one_command_goes_from_raw_samples_of_all_sources_to_200_steps(
    samples: Callable[[Path], None], tmp_path: Path
) -> None:
    if samples is real_samples and shared_data() is None:
        pytest.skip("no shared data here")
    samples(tmp_path / "raw")
    command = [
        sys.executable, "-m", "launch.from_raw", f"raw={tmp_path / 'raw'}", f"output={tmp_path / 'out'}",
        "vocab_size=1000", "lm_pieces=1000",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for attempt in (1, 2):  # the second finds all done
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert status(tmp_path / "out" / "run")["state"] == "done"
        assert done.stdout.count("whole; every document is accounted for") == 15
        _, _, mixture = done.stdout.partition("Dataset ")
        table = {line.split()[0]: line.split() for line in mixture.splitlines()[1:9]}
        assert {*table} == {*SEVEN, "all"}
        assert table["common_crawl"][1] == "67.00%" and table["stackexchange"][1] == "2.00%"
        records = metrics(tmp_path / "out" / "run")
        assert records[-1]["step"] == 200
        assert records[-1]["train/loss"] < records[0]["train/loss"] - 0.5, attempt
