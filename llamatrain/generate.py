"""Write on from a prompt with a checkpoint of a run.

python -m llamatrain.generate checkpoint=RUN_OR_STEP_DIRECTORY prompt="Once upon a time"
python -m llamatrain.generate checkpoint=… 'prompt=["Once upon a time","The moon"]' temperature=0
"""

from pathlib import Path

from llamatrain.checkpoint.commit import find_checkpoint
from llamatrain.cli import run_command
from llamatrain.config.generate import GenerateConfig, check_generate

DEFAULT_NEW_TOKENS = 128


def run(settings: GenerateConfig) -> None:
    """Print each prompt with what the model writes after it."""
    check_generate(settings)
    assert settings.checkpoint is not None  # checked above
    checkpoint = find_checkpoint(Path(settings.checkpoint))  # before torch, which takes seconds to import
    from llamatrain.checkpoint.inference import load_model_for_inference
    from llamatrain.device import PRECISIONS, choose_device, choose_precision
    from llamatrain.model.generation import generate

    device = choose_device(settings.device, setting="device")
    dtype = PRECISIONS[choose_precision(settings.precision, device)]
    model, tokenizer = load_model_for_inference(checkpoint, device, compute_dtype=dtype)
    prompts = [tokenizer.encode(text, bos=True) for text in settings.prompts]
    room = model.config.max_seq_len - max(map(len, prompts))
    continuations = generate(
        model,
        prompts,
        max_new_tokens=settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, max(1, room)),
        temperature=settings.temperature,
        top_p=settings.top_p,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        seed=settings.seed,
    )
    for prompt, continuation in zip(prompts, continuations, strict=True):
        print(tokenizer.decode(prompt + continuation), end="\n\n", flush=True)


def main() -> None:
    run_command(GenerateConfig, "commands/generate", run, help_text=__doc__)


if __name__ == "__main__":
    main()
