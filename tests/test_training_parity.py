"""Training against an independent model: Hugging Face's LLaMA under torch's AdamW, same weights, same batches."""

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llamatrain.config import RunConfig
from llamatrain.data.loader import Batch, Loader
from llamatrain.optim.schedule import learning_rate
from llamatrain.trainer import Trainer
from tests.hugging_face import to_hugging_face
from tests.real_text import english_documents
from tests.small_run import small_config, trainer_for

STEPS = 100
TOLERANCE = 1e-3  # relative, on each of the 100 losses


def hugging_face_model(trainer: Trainer) -> LlamaForCausalLM:
    """The trainer's model in the other implementation."""
    model = trainer.config.model
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    twin = LlamaForCausalLM(config)
    twin.load_state_dict(to_hugging_face(trainer.model.state_dict(), model))
    return twin


def train_twin(twin: nn.Module, batches: Iterable[Batch], config: RunConfig) -> list[float]:
    """The recipe written out with torch's own parts; the loss of every step."""
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    norms = [p for p in twin.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    losses = []
    for step, batch in enumerate(batches, start=1):
        logits = twin(batch.tokens[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optim, schedule_steps=config.schedule_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_loss_curve_is_that_of_an_independent_model(tiny_dataset: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_dataset("english", english_documents(tmp_path / "corpus"), tmp_path / "data")
    config = small_config(
        tmp_path / "run",
        {"english": source},
        model={"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 64},
        data={"seq_len": 64},
        train={"steps": STEPS, "global_batch_tokens": 16 * 64, "micro_batch": 8},
        optim={"lr": 6e-4, "warmup_steps": 10, "schedule_steps": STEPS},
        evaluation={"every_steps": 0},
    )
    with ExitStack() as resources:
        trainer = trainer_for(config, resources)
        twin = hugging_face_model(trainer)
        loader = resources.enter_context(
            Loader(trainer.sources, trainer.order, trainer.data_state, seq_len=64, global_batch=16, micro_batch=8)
        )
        batches = list(islice(loader, STEPS))
        losses = [trainer.train_step(batch)[0].item() for batch in batches]
    expected = train_twin(twin, batches, config)
    assert losses == pytest.approx(expected, rel=TOLERANCE)
    assert losses[0] == pytest.approx(math.log(config.model.vocab_size), rel=0.02)
    assert losses[-1] < 0.85 * losses[0]  # a curve, not a flat line
