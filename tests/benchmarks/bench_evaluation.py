"""Questions per second of the scorer beside lm-evaluation-harness's model for Transformers, on the same weights.

    python -m tests.benchmarks.bench_evaluation --checkpoint RUN --data DIRECTORY

Needs the extra `eval`, Transformers and accelerate. Both are given the same texts, contexts and continuations or
prompts, and answer them all: encoding is measured too, reading files is not. The checkpoint is exported by
`llamatrain.convert`. The harness has the batch size that is fastest in a trial of its own. They take turns, several
rounds, and what is told is the ratio of the same round. What they answer is compared too: the likelier choice per
character, and the texts but for the space before them, which Transformers drops.
"""

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import Any

import torch

from llamatrain.checkpoint.interchange.conversion import convert
from llamatrain.config.convert import ConvertConfig
from llamatrain.distributed import World
from llamatrain.evaluation.catalogue import load_task
from llamatrain.evaluation.model_scorer import ModelScorer
from llamatrain.evaluation.scoring import Generation, Likelihood
from llamatrain.evaluation.task import Conditions
from llamatrain.parallel.answering import answering
from llamatrain.scorer import open_on
from tests.benchmarks.paired import paired_ratio, turn_order

BATCH_SIZES = (1, 4, 16, 64)
TRIED = 24  # questions of the trial
CHOICES, TEXTS = ("arc_easy", "piqa", "hellaswag", "mmlu"), ("natural_questions",)


@dataclass(frozen=True)
class Set:
    """The requests of a task, in the order of its questions."""

    name: str
    questions: int
    likelihoods: list[list[Likelihood]]
    generations: list[Generation]


class Noting:
    """A scorer that answers nothing much, and notes what a task asks."""

    def __init__(self) -> None:
        self.likelihoods_asked: list[Likelihood] = []
        self.generations_asked: list[Generation] = []

    def likelihoods(self, requests: Any, *, description: str = "") -> list[Any]:
        from llamatrain.evaluation.scoring import LikelihoodScore

        self.likelihoods_asked = list(requests)
        return [LikelihoodScore(-1.0, 1, False) for _ in requests]

    def document_likelihoods(self, texts: Any, *, description: str = "") -> list[Any]:
        raise NotImplementedError

    def generations(self, requests: Any, *, seed: int = 0, description: str = "") -> list[list[str]]:
        self.generations_asked = list(requests)
        return [[""] for _ in requests]


def asked(name: str, data: Path, questions: int, **settings: Any) -> Set:
    """What the task asks of a model: its questions, the first so many (of MMLU's first subjects)."""
    task, noting = load_task(name, settings=settings), Noting()
    files, missing = task.find(data)
    if missing:
        raise SystemExit(f"{name}: no file {missing[0]}")
    result = task.kind.score(task.settings, files, noting, Conditions(max_questions=questions))
    if noting.generations_asked:
        return Set(name, len(noting.generations_asked), [], noting.generations_asked)
    counts = [len(item["log_probabilities"]) for item in result.items] if result.items else []
    rows, place = [], 0
    for count in counts:
        rows.append(noting.likelihoods_asked[place : place + count])
        place += count
    assert place == len(noting.likelihoods_asked), name
    return Set(name, len(rows), rows, [])


def instances(some: Set) -> list[Any]:
    """The same as the harness's requests."""
    from lm_eval.api.instance import Instance

    if some.generations:
        settings = [
            {"until": list(g.stop), "max_gen_toks": g.max_new_tokens, "do_sample": False} for g in some.generations
        ]
        pairs: list[Any] = list(zip((g.context for g in some.generations), settings, strict=True))
        kind = "generate_until"
    else:
        pairs = [(request.context, request.continuation) for row in some.likelihoods for request in row]
        kind = "loglikelihood"
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=n) for n, pair in enumerate(pairs)]


def ask_scorer(scorer: ModelScorer, some: Set) -> list[Any]:
    if some.generations:
        return [texts[0].strip() for texts in scorer.generations(some.generations)]
    flat = [request for row in some.likelihoods for request in row]
    return chosen(some, [score.log_probability for score in scorer.likelihoods(flat)])


def ask_harness(model: Any, some: Set) -> list[Any]:
    if some.generations:
        return [text.strip() for text in model.generate_until(instances(some), disable_tqdm=True)]
    return chosen(some, [score for score, _ in model.loglikelihood(instances(some), disable_tqdm=True)])


def chosen(some: Set, scores: list[float]) -> list[int]:
    """The likeliest choice per character of every question."""
    answers, left = [], iter(scores)
    for row in some.likelihoods:
        values = [next(left) / max(1, len(request.continuation.strip())) for request in row]
        answers.append(max(range(len(values)), key=values.__getitem__))
    return answers


def seconds(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    began = time.perf_counter()
    answers = work()
    return time.perf_counter() - began, answers


def fastest_batch_size(model: Any, some: Set) -> int:
    few = Set(some.name, TRIED, some.likelihoods[:TRIED], some.generations[:TRIED])
    times = {}
    for size in BATCH_SIZES:
        model.batch_size_per_gpu = size
        times[size] = seconds(lambda: ask_harness(model, few))[0]
    return min(times, key=times.__getitem__)


def compare(some: Set, scorer: ModelScorer, model: Any, adapter: Any, *, rounds: int) -> dict[str, Any]:
    """Rates of all in every round, and how often they agree."""
    size = fastest_batch_size(model, some)
    model.batch_size_per_gpu = size
    ways: dict[str, Callable[[], list[Any]]] = {
        "llamatrain": lambda: ask_scorer(scorer, some),
        "harness, llamatrain's model": lambda: ask_harness(adapter, some),
        "harness, Transformers": lambda: ask_harness(model, some),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[Any]] = {}
    for number in range(rounds):
        for name in turn_order(list(ways), number):
            took, answers[name] = seconds(ways[name])
            rates[name].append(some.questions / took)
    return {
        "rates": rates,
        "same": sum(map(eq, answers["llamatrain"], answers["harness, Transformers"])),
        "adapter_same": sum(map(eq, answers["llamatrain"], answers["harness, llamatrain's model"])),
        "batch_size": size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="*", default=[*CHOICES, *TEXTS])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    from lm_eval.models.huggingface import HFLM

    from llamatrain.evaluation.harness_model import HarnessModel

    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    opened = open_on(World(), options.checkpoint, device="cpu", precision="fp32")
    with tempfile.TemporaryDirectory() as directory, answering(opened.model):
        exported = Path(directory) / "hf"
        convert(ConvertConfig(input=options.checkpoint, output=str(exported), to="huggingface"))
        model = HFLM(pretrained=str(exported), device="cpu", dtype="float32", add_bos_token=True, batch_size=1)
        adapter = HarnessModel(opened.scorer)
        print(f"{options.threads} threads, {options.rounds} rounds; questions/s, median of the rounds\n")
        columns = ["task", "questions", "llamatrain", "harness, llamatrain's model", "harness, Transformers", "ratio"]
        columns += ["same answers as Transformers", "same answers in the harness"]
        print_row(columns)
        print_row(["---"] * len(columns))
        for name in options.tasks:
            settings = {"shots": [0]} if name == "natural_questions" else {}
            some = asked(name, options.data, options.questions, **settings)
            found = compare(some, opened.scorer, model, adapter, rounds=options.rounds)
            rates = list(found["rates"].values())
            ours, adapted, theirs = map(statistics.median, rates)
            print_row(
                [name, some.questions, f"{ours:.1f}", f"{adapted:.1f}"]
                + [f"{theirs:.1f} (batches of {found['batch_size']})", paired_ratio(rates[0], rates[2])]
                + [f"{found[way]} of {some.questions}" for way in ("same", "adapter_same")]
            )


def print_row(cells: list[Any]) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
