"""`make demo`: the main job on input every machine has, from raw text to samples of a trained model.

Each stage is a command a user would type; it is printed before it runs, and each can be run again: what is done
is not done twice. No torch is imported here.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from launch.stages import leave_if_stopped, run_stage

DATA = Path("runs/demo-data")
RUN = Path("runs/demo")
SOURCES = ("code", "docs")
VOCABULARY = 4096
REQUIRED_MARGIN = 1.2  # nats that the model has to be under the unigram entropy
PROMPTS = ("def ", "import ", "Return ", "class ")


def stages() -> list[list[str]]:
    """The commands of the demo, in order."""
    tokenizer = f"{DATA}/tokenizer/tokenizer.model"
    inputs = [f"{DATA}/corpus/{source}.jsonl.zst" for source in SOURCES]
    return [
        ["data_tools.stdlib_corpus", f"output={DATA}/corpus"],
        [
            "data_tools.train_tokenizer",
            f"input=[{','.join(inputs)}]",
            f"output={DATA}/tokenizer",
            f"vocab_size={VOCABULARY}",
        ],
        *(
            [
                "data_tools.tokenize_shards",
                f"source={source}",
                f"input={path}",
                f"tokenizer={tokenizer}",
                f"output={DATA}/{source}",
                "holdout_by=group",
                "validation_fraction=0.05",
            ]
            for source, path in zip(SOURCES, inputs, strict=True)
        ),
        ["llamatrain.train", "experiment=demo"],
        [
            "llamatrain.generate",
            f"checkpoint={RUN}",
            f"prompt=[{','.join(json.dumps(prompt) for prompt in PROMPTS)}]",
            "max_new_tokens=60",
            "temperature=0.7",
        ],
    ]


def validation_records(metrics: Path) -> list[dict[str, Any]]:
    """The validation records of a run, oldest first."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if "eval/validation/loss" in record]


def print_losses(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The table of losses; returns how far the model ends under the unigram entropy, in nats."""
    print(f"\nvalidation loss, nats per token (step {before['step']} and step {after['step']})")
    print(f"{'':>8} {'before':>8} {'after':>8} {'unigram entropy':>16} {'under it by':>12} {'bits per byte':>14}")
    for label, task in [*((s, f"validation.{s}") for s in SOURCES), ("both", "validation")]:
        loss, entropy = after[f"eval/{task}/loss"], after[f"eval/{task}/unigram_entropy"]
        print(
            f"{label:>8} {before[f'eval/{task}/loss']:8.4f} {loss:8.4f} {entropy:16.4f} {entropy - loss:12.4f} "
            f"{after[f'eval/{task}/bits_per_byte']:14.4f}"
        )
    margin: float = after["eval/validation/unigram_entropy"] - after["eval/validation/loss"]
    return margin


def main() -> None:
    started = time.monotonic()
    for stage in stages():
        run_stage(stage)
        if stage[0] == "llamatrain.train":
            leave_if_stopped(RUN, "make demo")
    records = validation_records(RUN / "metrics.jsonl")
    margin = print_losses(records[0], records[-1])
    print(f"\ncorpus, tokenizer, shards  {DATA}/")
    print(f"run                        {RUN}/  (metrics.jsonl, journal.jsonl, status.json, config.yaml)")
    print(f"checkpoints                {RUN}/checkpoints/")
    print(f"the demo took              {time.monotonic() - started:.0f} s")
    if margin < REQUIRED_MARGIN:
        sys.exit(f"error: the model ends {margin:.3f} nats under the unigram entropy, less than {REQUIRED_MARGIN}")


if __name__ == "__main__":
    main()
