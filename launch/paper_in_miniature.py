"""`make paper-in-miniature`: the whole way of the paper, once, small: raw dumps to an evaluated and exported model.

    python -m launch.paper_in_miniature raw=DIRECTORY questions=DIRECTORY output=DIRECTORY [key=value …]

`raw` has a folder for each source (see launch.from_raw), `questions` one for each evaluation set (docs/evaluation.md).
Every source is prepared, without what the evaluation sets contain, and audited; a tokenizer is trained; the tokens are
mixed in the paper's proportions; a small LLaMA is trained, and evaluated while it trains and at its end; the report is
written, the model exported, and Hugging Face's transformers must write the same greedy text with it.

Each stage is a command that is printed before it runs. Started again, what is done is not done twice.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from launch.from_raw import check_begun, data_stages
from launch.stages import leave_if_stopped, run_stage
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError

SUITE = "llama_paper"
# What decontamination looks for: files of evaluation sets, and the field of a question
CONTAMINANTS = {
    "gsm8k": ("test.jsonl", "question"),
    "hellaswag": ("hellaswag_val_sample.jsonl", "ctx"),
    "humaneval": ("HumanEval.jsonl.gz", "prompt"),
    "nq_open": ("NQ-open.dev.jsonl", "question"),
    "piqa": ("valid.jsonl", "goal"),
}
WATCHED = ("piqa", "hellaswag", "arc_easy")  # during training, of those there are
TIMES = 5  # that the training stops to be evaluated and saved
NEW_TOKENS = 48
PROMPTS = ("The ", "In the year ", "import ")


@dataclass
class MiniatureSettings:
    raw: str = "???"  # directory with a folder for each source
    questions: str = "???"  # directory with a folder for each evaluation set
    output: str = "???"  # directory for all that is made
    steps: int = 700  # of the training
    batch_tokens: int = 4096  # of a step
    seq_len: int = 256
    dim: int = 256  # of the model
    layers: int = 4
    heads: int = 4
    vocab_size: int = 4096  # of the tokenizer
    lm_pieces: int = 4000  # vocabulary of the language model that grades CommonCrawl, trained on Wikipedia
    max_questions: int = 100  # of each evaluation set


def check_settings(settings: MiniatureSettings) -> None:
    """Raises ConfigError."""
    for name in ("raw", "questions", "output"):
        if getattr(settings, name) in ("", "???"):
            raise ConfigError(f"{name} is not set: {name}=DIRECTORY")
    if not Path(settings.questions).is_dir():
        raise ConfigError(f"questions={settings.questions}: no such directory")
    for name, value in vars(settings).items():
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")


def decontamination(evaluation: Path) -> str | None:
    """The sets that are there, as prepare takes them."""
    found = {name: (evaluation / name / file, field) for name, (file, field) in CONTAMINANTS.items()}
    sets = [
        f"{{name: {name}, path: {json.dumps(str(path))}, fields: [{field}]}}"
        for name, (path, field) in found.items()
        if path.exists()
    ]
    return f"[{','.join(sets)}]" if sets else None


def train_command(settings: MiniatureSettings) -> list[str]:
    """The training, which evaluates as it goes."""
    output, evaluation = Path(settings.output), Path(settings.questions)
    often = max(1, settings.steps // TIMES)
    watched = [name for name in WATCHED if (evaluation / name).is_dir()]
    return [
        "llamatrain.train", "--config-dir", str(output / "mixture"), "data=mixture", "name=paper_in_miniature",
        f"run_dir={output / 'run'}", "model=15m", f"model.dim={settings.dim}", f"model.n_layers={settings.layers}",
        f"model.n_heads={settings.heads}", f"model.vocab_size={settings.vocab_size}",
        f"model.max_seq_len={max(1024, settings.seq_len)}", f"data.seq_len={settings.seq_len}",
        f"train.steps={settings.steps}", f"train.global_batch_tokens={settings.batch_tokens}",
        f"train.micro_batch={max(1, min(16, settings.batch_tokens // settings.seq_len))}",
        "optim.lr=3e-3", f"optim.warmup_steps={max(1, settings.steps // 20)}", "logging.every_steps=10",
        f"checkpoint.every_steps={often}", "checkpoint.keep_last=2",
        f"evaluation.every_steps={often}", "evaluation.max_tokens=20000",
        f"evaluation.samples=[{','.join(json.dumps(prompt) for prompt in PROMPTS)}]", "evaluation.sample_tokens=48",
        f"evaluation.data={evaluation}", f"evaluation.tasks=[{','.join(watched)}]",
        f"evaluation.tasks_every_steps={often if watched else 0}", f"evaluation.max_questions={settings.max_questions}",
    ]  # fmt: skip


def stages(settings: MiniatureSettings) -> Iterator[list[str]]:
    """The commands up to the trained model, in order. Raises ConfigError."""
    yield from data_stages(
        Path(settings.raw),
        Path(settings.output),
        vocab_size=settings.vocab_size,
        lm_pieces=settings.lm_pieces,
        train_tokens=settings.steps * settings.batch_tokens,
        decontamination=decontamination(Path(settings.questions)),
        tokenize=["tokenize.validation_fraction=0.05"],
    )
    yield train_command(settings)


def use_stages(settings: MiniatureSettings) -> Iterator[list[str]]:
    """What is done with the trained model, in order."""
    run, exported = Path(settings.output) / "run", Path(settings.output) / "exported"
    yield [
        "llamatrain.evaluate", f"checkpoint={run}", f"suite={SUITE}", f"data={settings.questions}",
        f"max_questions={settings.max_questions}", "resume=true",
        "task_settings.gsm8k.majority.samples=5",  # of the paper's 100
    ]  # fmt: skip
    yield ["llamatrain.report", f"run={run}", f"output={Path(settings.output) / 'report'}"]
    if not exported.exists():  # made whole or not at all
        yield ["llamatrain.convert", f"input={run}", "to=huggingface", f"output={exported}"]


def greedy_texts(checkpoint: Path, exported: Path) -> list[tuple[str, str]]:
    """What llamatrain and transformers write after each prompt, taking the likeliest token: pairs of texts."""
    import torch

    from llamatrain.checkpoint.inference import load_model_for_inference
    from llamatrain.model.generation import generate

    model, tokenizer = load_model_for_inference(checkpoint, torch.device("cpu"), compute_dtype=torch.float32)
    transformers: Any = import_module("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    pairs = []
    for text in PROMPTS:
        prompt = tokenizer.encode(text, bos=True)
        written = generate(
            model, [prompt], max_new_tokens=NEW_TOKENS, temperature=0, eos_id=tokenizer.eos_id,
            vocab_size=tokenizer.vocab_size,
        )  # fmt: skip
        inputs = their_tokenizer(text, return_tensors="pt")
        answer = theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        pairs.append(
            (tokenizer.decode(prompt + written[0]), their_tokenizer.decode(answer[0], skip_special_tokens=True))
        )
    return pairs


def compare_texts(pairs: list[tuple[str, str]]) -> None:
    """Print them. A difference ends the program with an error."""
    for ours, theirs in pairs:
        print(f"\nboth:         {ours!r}" if ours == theirs else f"\nllamatrain:   {ours!r}\ntransformers: {theirs!r}")
    if any(ours != theirs for ours, theirs in pairs):
        sys.exit("error: the exported model does not write the same text")


def paper_in_miniature(settings: MiniatureSettings) -> None:
    """Run all stages. Raises ConfigError; a stage that fails ends the program with its status."""
    started = time.monotonic()
    check_settings(settings)
    output = Path(settings.output)
    sizes = {name: value for name, value in vars(settings).items() if isinstance(value, int)}
    for number, arguments in enumerate(stages(settings)):
        if number == 0:  # the folders are as they must be
            check_begun(output, sizes)
        run_stage(arguments)
    leave_if_stopped(output / "run", "the same command")
    for arguments in use_stages(settings):
        run_stage(arguments)
    compare_texts(greedy_texts(output / "run", output / "exported"))
    print(f"\ndocuments, tokens, mixture, run  {output}/")
    print(f"report                           {output / 'report'}/")
    print(f"for Hugging Face's transformers  {output / 'exported'}/")
    print(f"it took                          {time.monotonic() - started:.0f} s")


def main() -> None:
    run_command(MiniatureSettings, "paper_in_miniature", paper_in_miniature, help_text=__doc__)


if __name__ == "__main__":
    main()
