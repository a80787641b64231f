"""From raw dumps to a trained model, in one command.

    python -m launch.from_raw raw=DIRECTORY output=DIRECTORY [steps=200] [vocab_size=4096]

`raw` has a folder for each source, named as python -m data_tools.prepare names it (common_crawl, c4 or c4_from_crawl,
github, wikipedia, books, arxiv, stackexchange). Every source is prepared and audited; a tokenizer is trained on what
was kept; the tokens are mixed in the paper's proportions, and a small LLaMA is trained on the mixture. The language
model that grades CommonCrawl is trained on the prepared Wikipedia, and its cut-offs are taken over the pages
themselves. The classifier of pages that Wikipedia cites needs examples of such pages, which no raw folder has: it is
left out here.

Each stage is a command that is printed before it runs. Started again, what is done is not done twice.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.stages import leave_if_stopped, run_stage
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError

SOURCES = ("wikipedia", "c4", "c4_from_crawl", "github", "books", "arxiv", "stackexchange", "common_crawl")
MODEL = ["model=15m", "model.dim=128", "model.n_layers=2", "model.n_heads=4", "model.max_seq_len=128"]
STEP_TOKENS = 1024


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


def stages(settings: FromRawSettings, sources: list[str]) -> Iterator[list[str]]:
    """The commands, in order."""
    raw, output = Path(settings.raw), Path(settings.output)
    prepared = {source: output / "prepared" / source for source in sources}
    tokenizer = output / "tokenizer" / "tokenizer.model"

    graded = {"common_crawl": ["after=[language,perplexity]", f"filters.perplexity.models={output / 'lm'}"]}

    def prepare(source: str, directory: Path, *options: str) -> list[list[str]]:
        where = [f"source={source}", f"input={raw / source}", f"output={directory}"]
        return [["data_tools.prepare", *where, *options], ["data_tools.audit", f"output={directory}"]]

    for source in sources:
        if source == "common_crawl":
            ungraded = output / "ungraded" / source
            yield from prepare(source, ungraded, "after=[language]")
            yield [
                "data_tools.train_ngrams", "language=en", f"input={prepared['wikipedia'] / 'documents'}",
                f"cutoffs_input={ungraded / 'documents'}", f"output={output / 'lm'}",
                f"vocab_size={settings.lm_pieces}",
            ]  # fmt: skip
        yield from prepare(source, prepared[source], *graded.get(source, []))
    documents = ",".join(str(directory / "documents") for directory in prepared.values())
    yield [
        "data_tools.train_tokenizer", f"input=[{documents}]", f"output={tokenizer.parent}",
        f"vocab_size={settings.vocab_size}",
    ]  # fmt: skip
    for source in sources:
        yield from prepare(source, prepared[source], *graded.get(source, []), f"tokenizer={tokenizer}")
    yield [
        "data_tools.mix", f"input={output / 'prepared'}", f"output={output / 'mixture'}",
        f"train_tokens={settings.steps * STEP_TOKENS}", "overwrite=true",
    ]  # fmt: skip
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
    for arguments in stages(settings, sources_in(Path(settings.raw))):
        run_stage(arguments)
    leave_if_stopped(Path(settings.output) / "run", "the same command")
    print(f"\ndocuments, tokens, mixture, run: {settings.output}")


def main() -> None:
    run_command(FromRawSettings, "from_raw", from_raw, help_text=__doc__)


if __name__ == "__main__":
    main()
