"""From raw dumps to a trained model, in one command.

    python -m launch.from_raw raw=DIRECTORY output=DIRECTORY [steps=200] [vocab_size=4096]

`raw` has a folder for each source, named as python -m data_tools.prepare names it (common_crawl, c4 or c4_from_crawl,
github, wikipedia, books, arxiv, stackexchange). Every source is prepared and audited; a tokenizer is trained on what
was kept; the tokens are mixed in the paper's proportions, and a small LLaMA is trained on the mixture. The language
model that grades CommonCrawl is trained on the prepared Wikipedia, and its cut-offs are taken over the pages
themselves. The classifier of pages that Wikipedia cites needs examples of such pages, which no raw folder has: it is
left out here.

Each stage is a command that is printed before it runs. Started again, what is done is not done twice. A source of which
nothing is kept ends it with the reasons: look at the folder, or leave it out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.stages import leave_if_stopped, run_stage
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import write_json_atomically

SOURCES = ("wikipedia", "c4", "c4_from_crawl", "github", "books", "arxiv", "stackexchange", "common_crawl")
MODEL = ["model=15m", "model.dim=128", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=128"]
STEP_TOKENS = 1024
SETTINGS_FILE = "from_raw.json"
AFTER = {"common_crawl": ["language", "perplexity"], "c4_from_crawl": ["language"]}  # filters after deduplication


@dataclass
class FromRawSettings:
    raw: str = "???"  # directory with a folder for each source
    output: str = "???"  # directory for documents, tokens, mixture and run
    steps: int = 200  # of the training
    vocab_size: int = 4096  # of the tokenizer
    lm_pieces: int = 4000  # vocabulary of the language model that grades CommonCrawl, trained on Wikipedia


def sources_in(raw: Path) -> list[str]:
    """Sources that have a folder, in the order they are prepared. Raises ConfigError."""
    if not raw.is_dir():
        raise ConfigError(f"raw={raw}: no such directory")
    folders = {path.name for path in raw.iterdir() if path.is_dir()}
    if unknown := folders - set(SOURCES):
        raise ConfigError(f"{raw / min(unknown)}: not a source; name the folders after {', '.join(SOURCES)}")
    if not folders:
        raise ConfigError(f"raw={raw}: no source in it; name a folder {', '.join(SOURCES[:-1])} or {SOURCES[-1]}")
    if "common_crawl" in folders and "wikipedia" not in folders:
        raise ConfigError(f"{raw}: a language model of Wikipedia grades common_crawl: add a folder wikipedia")
    if {"c4", "c4_from_crawl"} <= folders:
        raise ConfigError(f"{raw}: c4 and c4_from_crawl are the same source; leave one")
    return [source for source in SOURCES if source in folders]


def check_begun(output: Path, given: dict[str, int]) -> None:
    """That what is in `output` was made with these settings, which are noted there. Raises ConfigError and DataError.

    `steps` may grow.
    """
    path = output / SETTINGS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name, value in given.items():
            begun = found.get(name, value)
            if begun > value or (begun != value and name != "steps"):
                more = " or more" if name == "steps" else ""
                raise ConfigError(
                    f"{name}={value}: {output} was begun with {begun}; give that{more}, or another output"
                )
        output.mkdir(parents=True, exist_ok=True)
        write_json_atomically(path, given)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read or written ({error}); give another output") from None


def data_stages(
    raw: Path,
    output: Path,
    *,
    vocab_size: int,
    lm_pieces: int,
    train_tokens: int,
    decontamination: str | None = None,
    tokenize: Sequence[str] = (),
) -> Iterator[list[str]]:
    """The commands from raw dumps to OUTPUT/mixture, in order. Raises ConfigError.

    `decontamination`: the sets whose examples every source leaves out (docs/data.md), as a list in YAML. `tokenize`:
    further options of the last stage.
    """
    if raw.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(
            f"output={output}: lies in raw={raw}, where only sources may be; give a directory outside of it"
        )
    sources = sources_in(raw)
    prepared = {source: output / "prepared" / source for source in sources}
    tokenizer = output / "tokenizer" / "tokenizer.model"

    def prepare(source: str, directory: Path, after: Sequence[str], *options: str) -> list[list[str]]:
        where = [f"source={source}", f"input={raw / source}", f"output={directory}"]
        if decontamination:
            after, options = [*after, "decontamination"], (f"filters.decontamination.sets={decontamination}", *options)
        if "perplexity" in after:
            options = (f"filters.perplexity.models={output / 'lm'}", *options)
        filtered = [f"after=[{','.join(after)}]"] if after else []
        return [
            ["data_tools.prepare", *where, *filtered, *options],
            ["data_tools.audit", f"output={directory}", "min_documents=1"],
        ]

    for source in sources:
        if source == "common_crawl":
            ungraded = output / "ungraded" / source
            yield from prepare(source, ungraded, ["language"])
            yield [
                "data_tools.train_ngrams", "language=en", f"input={prepared['wikipedia'] / 'documents'}",
                f"cutoffs_input={ungraded / 'documents'}", f"output={output / 'lm'}", f"vocab_size={lm_pieces}",
            ]  # fmt: skip
        yield from prepare(source, prepared[source], AFTER.get(source, []))
    documents = ",".join(str(directory / "documents") for directory in prepared.values())
    yield [
        "data_tools.train_tokenizer", f"input=[{documents}]", f"output={tokenizer.parent}", f"vocab_size={vocab_size}",
    ]  # fmt: skip
    for source in sources:
        yield from prepare(source, prepared[source], AFTER.get(source, []), *tokenize, f"tokenizer={tokenizer}")
    yield [
        "data_tools.mix", f"input={output / 'prepared'}", f"output={output / 'mixture'}",
        f"train_tokens={train_tokens}", "overwrite=true",
    ]  # fmt: skip


def stages(settings: FromRawSettings) -> Iterator[list[str]]:
    """All commands, in order. Raises ConfigError."""
    raw, output = Path(settings.raw), Path(settings.output)
    yield from data_stages(
        raw,
        output,
        vocab_size=settings.vocab_size,
        lm_pieces=settings.lm_pieces,
        train_tokens=settings.steps * STEP_TOKENS,
    )
    yield [
        "llamatrain.train", "--config-dir", str(output / "mixture"), "data=mixture", *MODEL,
        f"model.vocab_size={settings.vocab_size}", "data.seq_len=128", f"run_dir={output / 'run'}",
        f"train.steps={settings.steps}", f"train.global_batch_tokens={STEP_TOKENS}", "train.micro_batch=8",
        "optim.lr=4e-3", f"optim.warmup_steps={max(1, settings.steps // 20)}", "evaluation.every_steps=0",
    ]  # fmt: skip


def from_raw(settings: FromRawSettings) -> None:
    """Run all stages. Raises ConfigError; a stage that fails ends the program with its status."""
    for name in ("raw", "output"):
        if getattr(settings, name) in ("", "???"):
            raise ConfigError(f"{name} is not set: {name}=DIRECTORY")
    for name in ("steps", "vocab_size", "lm_pieces"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)}: must be at least 1")
    given = {name: getattr(settings, name) for name in ("steps", "vocab_size", "lm_pieces")}
    for number, arguments in enumerate(stages(settings)):
        if number == 0:  # the folders are as they must be
            check_begun(Path(settings.output), given)
        run_stage(arguments)
    leave_if_stopped(Path(settings.output) / "run", "the same command")
    print(f"\ndocuments, tokens, mixture, run: {settings.output}")


def main() -> None:
    run_command(FromRawSettings, "from_raw", from_raw, help_text=__doc__)


if __name__ == "__main__":
    main()
