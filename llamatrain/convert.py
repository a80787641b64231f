"""Convert weights and tokenizer between this program, Hugging Face and Meta's released files.

python -m llamatrain.convert input=runs/NAME output=DIRECTORY to=huggingface dtype=bf16
python -m llamatrain.convert input=runs/NAME output=DIRECTORY to=meta shards=8
python -m llamatrain.convert input=LLAMA/7B output=imports/7b to=llamatrain
python -m llamatrain.train init.from=imports/7b …      # continue its pretraining
"""

import logging

from llamatrain.cli import run_command
from llamatrain.config.convert import ConvertConfig, check_convert


def run(settings: ConvertConfig) -> None:
    """Write the output, or raise LlamatrainError and leave none."""
    check_convert(settings)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from llamatrain.checkpoint.interchange.conversion import convert

    print(f"wrote {convert(settings)}")


def main() -> None:
    run_command(ConvertConfig, "commands/convert", run, help_text=__doc__)


if __name__ == "__main__":
    main()
