"""The command line as a user meets it, in processes of its own."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from data_tools.audit import AuditSettings
from data_tools.data_card import DataCardSettings
from data_tools.mix import MixSettings
from data_tools.reference_urls import ReferenceUrlsSettings
from data_tools.show_samples import ShowSamplesSettings
from data_tools.stdlib_corpus import StdlibCorpusSettings
from data_tools.tokenize_shards import TokenizeShardsSettings
from data_tools.train_ngrams import TrainNgramsSettings
from data_tools.train_quality import TrainQualitySettings
from data_tools.train_tokenizer import TrainTokenizerSettings
from data_tools.verify_shards import VerifyShardsSettings
from launch.from_raw import FromRawSettings
from launch.paper_in_miniature import MiniatureSettings
from llamatrain.cli import command_line
from llamatrain.config import RunConfig, validate
from llamatrain.config.build import build, plain
from llamatrain.config.check import CheckConfig
from llamatrain.config.convert import ConvertConfig
from llamatrain.config.evaluate import EvaluateConfig
from llamatrain.config.generate import GenerateConfig
from llamatrain.config.goodput import GoodputConfig
from llamatrain.config.report import ReportConfig
from tests.small_run import assert_same_run, saved_steps, status

REPOSITORY = Path(__file__).parent.parent
EXPERIMENTS = [path.stem for path in (REPOSITORY / "conf" / "experiment").glob("*.yaml")]


def command(*arguments: str, cwd: Path, module: str = "llamatrain.train") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "error: optim.lrr: there is no such setting; did you mean optim.lr?\n"),
        ("train.step=3", "error: train.step: there is no such setting; did you mean train.steps?\n"),
        ("modell=7b", "error: modell: there is no such setting; did you mean model?\n"),
        ("optim.lr=fast", "error: optim.lr='fast': must be a number\n"),
        ("optim.lr", "error: optim.lr: cannot be understood; write it as key=value"),
        ("train.steps=a{b", "error: train.steps='a{b': must be a whole number\n"),
        ("optim.lr=1e-4,3e-4", "error: optim.lr='1e-4,3e-4': must be a number\n"),
        ("+optim.foo=1", "error: optim.foo: there is no such setting"),
        ("experiment=demoo", "did you mean experiment=demo? conf/experiment has demo, paper_13b"),
        ("model=8b", "error: model=8b: there is no such choice;"),
        ("model=15", "error: model=15: there is no such choice; did you mean model=15m?"),
        ("model=null", "error: model=null: model takes the name of one of 110m, 13b,"),
        ("model=/home/me/mine.yaml", "error: model=/home/me/mine.yaml: model takes the name of one of 110m, 13b,"),
        ("model=7B", "did you mean model=7b?"),
        ("train.steps=inf", "error: train.steps=inf: must be finite\n"),
        ("optim.lr=nan", "error: optim.lr=nan: must be finite\n"),
        ("name=${nme}", r"write \${…} for the characters themselves"),
        ("run_dir=", "error: run_dir is empty: run_dir=…\n"),
        ("train.steps=5", "error: data.sources is empty: name at least one with data.sources.NAME.path=DIRECTORY"),
    ],
)
def test_a_typo_gets_one_line_with_the_way_out(override: str, message: str, tmp_path: Path) -> None:
    done = command(override, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_a_whole_valid_run(experiment: str, tmp_path: Path) -> None:
    done = command(f"experiment={experiment}", "--cfg", "job", "--resolve", cwd=tmp_path)
    config = build(RunConfig, yaml.safe_load(done.stdout))
    validate(config)
    assert config.name
    if experiment.startswith("paper"):
        assert config.global_batch == 2048
        assert config.data.seq_len == 2048
        assert {name: source.weight for name, source in config.data.sources.items()} == {
            "common_crawl": 67.0,
            "c4": 15.0,
            "github": 4.5,
            "wikipedia": 4.5,
            "books": 4.5,
            "arxiv": 2.5,
            "stackexchange": 2.0,
        }


@pytest.mark.parametrize(
    ("size", "lr", "tokens", "eps"),
    [
        ("7b", 3e-4, 1.0e12, 1e-6),
        ("13b", 3e-4, 1.0e12, 1e-6),
        ("33b", 1.5e-4, 1.4e12, 1e-6),
        ("65b", 1.5e-4, 1.4e12, 1e-5),
    ],
)
def test_the_papers_experiments_have_the_papers_numbers(
    size: str, lr: float, tokens: float, eps: float, tmp_path: Path
) -> None:
    done = command(f"experiment=paper_{size}", "--cfg", "job", "--resolve", cwd=tmp_path)
    config = build(RunConfig, yaml.safe_load(done.stdout))
    assert (config.optim.lr, config.train.tokens, config.model.norm_eps) == (lr, tokens, eps)
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.95, 1e-8)
    assert (config.optim.weight_decay, config.optim.clip_norm, config.optim.min_lr_ratio) == (0.1, 1.0, 0.1)
    assert config.optim.warmup_steps == 2000
    assert config.total_steps == -(-int(tokens) // 4_194_304)


def test_the_configuration_is_printed_in_under_a_second_without_torch(tmp_path: Path) -> None:
    times = []
    for _ in range(3):
        begin = os.times()
        done = command("experiment=demo", "optim.lr=5e-4", "--cfg", "job", cwd=tmp_path)
        end = os.times()  # processor time: on the clock a busy machine counts too
        times.append(end.children_user + end.children_system - begin.children_user - begin.children_system)
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 5e-4
    assert min(times) < 1.0
    code = "import sys, llamatrain.train, data_tools.tokenize_shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_help_fits_two_screens_and_names_what_a_newcomer_needs(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert len(lines) <= 48
    assert max(map(len, lines)) <= 120
    for word in (
        "model=",
        "data.sources.NAME.path",
        "train.steps",
        "optim.lr",
        "--cfg job",
        "--multirun",
        "experiment=",
    ):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("commands/check", CheckConfig),
        ("commands/convert", ConvertConfig),
        ("commands/evaluate", EvaluateConfig),
        ("commands/generate", GenerateConfig),
        ("commands/goodput", GoodputConfig),
        ("commands/report", ReportConfig),
        ("data_tools/train_tokenizer", TrainTokenizerSettings),
        ("data_tools/tokenize_shards", TokenizeShardsSettings),
        ("data_tools/verify_shards", VerifyShardsSettings),
        ("data_tools/show_samples", ShowSamplesSettings),
        ("data_tools/stdlib_corpus", StdlibCorpusSettings),
        ("data_tools/audit", AuditSettings),
        ("data_tools/train_ngrams", TrainNgramsSettings),
        ("data_tools/train_quality", TrainQualitySettings),
        ("data_tools/reference_urls", ReferenceUrlsSettings),
        ("from_raw", FromRawSettings),
        ("paper_in_miniature", MiniatureSettings),
        ("data_tools/mix", MixSettings),
        ("data_tools/data_card", DataCardSettings),
    ],
)
def test_a_commands_file_lists_every_setting_with_its_default(name: str, schema: type) -> None:
    values = yaml.safe_load((REPOSITORY / "conf" / f"{name}.yaml").read_text())
    assert build(schema, values) == schema()
    assert set(values) == {field.name for field in dataclasses.fields(schema)}


@pytest.mark.parametrize(
    "group", ["init", "data", "train", "optim", "parallel", "checkpoint", "logging", "evaluation", "resilience"]
)
def test_a_groups_default_file_is_that_of_its_dataclass(group: str) -> None:
    path = REPOSITORY / "conf" / group / ("adamw.yaml" if group == "optim" else "default.yaml")
    values = yaml.safe_load(path.read_text())
    assert getattr(build(RunConfig, {group: values}), group) == getattr(RunConfig(), group)
    assert set(values) == set(plain(getattr(RunConfig(), group)))


def test_flags_and_overrides_may_stand_in_any_order() -> None:
    arguments = command_line(["model=15m", "--cfg", "job", "optim.lr=1"], groups={"model"}, texts=set())
    assert arguments[:2] == ["--cfg", "job"]
    assert arguments[-2:] == ["model=15m", "++optim.lr=1"]
    assert command_line(["--info"], groups=set(), texts=set())[:2] == ["--info", "all"]


@pytest.mark.parametrize(
    "value",
    [
        "1e5",
        "true",
        "Hello, world",
        "def f(x):",
        "it's",
        "a\\'b\\",
        "'",
        "{",
        "[1",
        "x=y=z",
        "tab\there",
        "100 %",
        "",
        "back\\slash",
        '"q"',
    ],
)
def test_any_text_may_be_a_value(value: str) -> None:
    *_, override = command_line([f"prompt={value}"], groups=set(), texts={"prompt"})
    parsed = OverridesParser.create().parse_override(override).value()
    assert str(getattr(parsed, "text", parsed)) == (value.strip('"') if value == '"q"' else value)


def test_tab_completion_works_in_bash(tmp_path: Path) -> None:
    script = """
    eval "$(python -m llamatrain.train -sc install=bash)"
    COMP_LINE="python -m llamatrain.train mod" _llamatrain_complete; echo "${COMPREPLY[@]}"
    COMP_LINE="python -m llamatrain.train experiment=de" _llamatrain_complete; echo "${COMPREPLY[@]}"
    COMP_LINE="python -m llamatrain.train optim.warm" _llamatrain_complete; echo "${COMPREPLY[@]}"
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["model.", "model="],
        ["experiment=demo"],
        ["optim.warmup_steps="],
    ]


def test_a_sweep_gives_each_job_a_directory_of_its_own(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_dataset("text", ["how much wood would a woodchuck chuck. " * 9] * 20, tmp_path / "data")
    done = command(
        "--multirun", "name=sweep", "model=15m", "model.dim=32", "model.n_layers=1", "model.n_heads=2",
        "model.max_seq_len=32", f"data.sources.text.path={data}", "data.seq_len=32", "train.steps=2",
        "train.global_batch_tokens=64", "optim.warmup_steps=1", "optim.lr=1e-4,2e-4", "train.device=cpu",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done: step 2 of 2") == 2  # every job is heard
    runs = sorted((tmp_path / "runs" / "sweep").iterdir())
    assert len(runs) == 2
    assert [path.name for path in runs] == ["optim.lr=0.0001", "optim.lr=0.0002"]
    assert [saved_steps(path) for path in runs] == [[2], [2]]


def test_two_processes_make_the_same_checkpoint(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    data = tiny_dataset("text", ["a penny saved is a penny earned. " * 9] * 20, tmp_path / "data")
    arguments = [
        "model=15m", "model.dim=32", "model.n_layers=1", "model.n_heads=2", "model.max_seq_len=32", "data.seq_len=32",
        f"data.sources.text.path={data}", "train.steps=2", "train.global_batch_tokens=64", "optim.warmup_steps=1",
        "train.device=cpu", "logging.every_steps=1",
    ]  # fmt: skip
    for name in ("one", "other"):
        assert command(f"name={name}", *arguments, cwd=tmp_path).returncode == 0
    assert_same_run(tmp_path / "runs" / "one", tmp_path / "runs" / "other", step=2)


def test_a_prompt_is_a_text_whatever_it_looks_like(tmp_path: Path) -> None:
    for prompt in ("1e5", "true", "a, b", "f(x"):
        done = command("--cfg", "job", f"prompt={prompt}", cwd=tmp_path, module="llamatrain.generate")
        assert yaml.safe_load(done.stdout)["prompt"] == prompt
    done = command("--cfg", "job", "prompt=[a,7]", cwd=tmp_path, module="llamatrain.generate")
    assert build(GenerateConfig, yaml.safe_load(done.stdout)).prompts == ["a", "7"]


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_data_directory_that_is_none_is_named(kind: str, tmp_path: Path) -> None:
    if kind == "empty":
        (tmp_path / "data").mkdir()
    if kind == "file":
        (tmp_path / "data").write_text("")
    done = command("model=15m", "data.sources.text.path=data", "train.steps=5000", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.sources.text: data")
    assert len(done.stderr.splitlines()) == 1


def test_bad_data_is_told_in_one_line_and_in_the_status(tmp_path: Path) -> None:
    done = command(
        "model=15m", "data.sources.text.path=nowhere", "train.steps=5", "train.global_batch_tokens=2048",
        "optim.warmup_steps=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: data\.sources\.text: nowhere: no dataset\.json there, .*\n", done.stderr)
    assert status(tmp_path / "runs" / "llama")["state"] == "bad_input"


def test_half_a_launcher_is_refused_plainly(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "llamatrain.train", "data.sources.a.path=x", "train.steps=5000"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "WORLD_SIZE=2 is set and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in done.stderr


def test_a_printed_configuration_is_a_checked_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llamatrain.train", "--cfg", "job", "--resolve", "name=here"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "run_dir: runs/here" in done.stdout.splitlines()
    refused = subprocess.run([*command, "train.stps=5"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "did you mean train.steps?" in refused.stderr


FAILING = """
import os, sys, time
from llamatrain import cli, process
process.TURN_S = float(sys.argv[1])
time.sleep(float(sys.argv[2]))
cli._fail("no good", 2)
"""


@pytest.mark.parametrize(("patience_s", "first_comes_after_s", "speaker"), [(20.0, 1.0, {0}), (0.2, 3.0, {1, 2, 3})])
def test_of_ranks_that_fail_alike_one_of_a_node_tells_it_and_none_leaves_before(
    patience_s: float, first_comes_after_s: float, speaker: set[int], tmp_path: Path
) -> None:
    def start(rank: int) -> "subprocess.Popen[str]":
        error_file = tmp_path / str(rank) / "error.json"
        error_file.parent.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TORCHELASTIC_ERROR_FILE": str(error_file)}
        environment |= {"RANK": str(4 + rank), "LOCAL_RANK": str(rank)}  # of the second node
        delay = first_comes_after_s if rank == 0 else 0.0
        command = [sys.executable, "-c", FAILING, str(patience_s), str(delay)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    ranks = [start(rank) for rank in range(4)]
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:  # as torchrun does as soon as one has left
        rank.terminate()
    told = [rank.communicate(timeout=30)[1] for rank in ranks]
    assert "".join(told) == "error: no good\n"
    assert told.index("error: no good\n") in speaker
