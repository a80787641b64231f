"""The peers: Hugging Face Transformers' LlamaForCausalLM and litgpt's GPT, each with its own loss.

A peer's setting:
- compile: off, each layer (layers), or the model with its loss (model), by torch.compile.
- weights: fp32; autocast (fp32 weights, products in bf16 by torch.autocast); copies (bf16 weights that compute, fp32
  ones for the optimizer, copied after each step).
- checkpointing: whether each layer is computed again in backward (Transformers).
- loss_chunk: tokens of the loss computed at once, 0 for all (litgpt).
"""

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llamatrain.config import ModelConfig
from llamatrain.optim.adamw import build_adamw
from tests.benchmarks.workload import OPTIM, Setting, Workload

Loss = Callable[[Tensor, Tensor], Tensor]  # (inputs, targets), int64 [B, T], to the mean loss of the targets


class Peer:
    """A model in the plain training loop."""

    def __init__(
        self, workload: Workload, setting: Setting, model: nn.Module, loss: Loss, layers: nn.ModuleList
    ) -> None:
        self._workload, self._weights = workload, setting["weights"]
        self.model = model.train()
        parameters = dict(model.named_parameters())
        if self._weights == "copies":
            self._computing: list[Tensor] = list(parameters.values())
            parameters = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
            for p in self._computing:
                p.data = p.data.to(torch.bfloat16)
        self._parameters: list[Tensor] = list(parameters.values())
        self._optimizer = build_adamw(parameters.items(), OPTIM)
        self._loss = loss
        if setting["compile"] == "layers":
            for layer in layers:
                layer.compile(dynamic=False)
        elif setting["compile"] == "model":
            self._loss = torch.compile(loss, dynamic=False)

    def step(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=rows.device)
        micro_batches = rows.split(self._workload.micro_batch)
        for part in micro_batches:
            with self._arithmetic():
                loss = self._loss(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(micro_batches)
            loss.backward()
            total += loss.detach()
        if self._weights == "copies":
            for p, copy in zip(self._parameters, self._computing, strict=True):
                assert copy.grad is not None
                p.grad, copy.grad = copy.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, OPTIM.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._weights == "copies":
            with torch.no_grad():
                torch._foreach_copy_(self._computing, self._parameters)
        return total, norm

    def _arithmetic(self) -> AbstractContextManager[object]:
        if self._weights == "autocast":
            return torch.autocast(self._workload.device, torch.bfloat16)
        return nullcontext()

    def close(self) -> None:
        """Nothing is held but memory."""


def transformers(workload: Workload, setting: Setting, weights: Mapping[str, Tensor] | None) -> Peer:
    """LlamaForCausalLM with torch's fused attention."""
    from transformers import LlamaForCausalLM

    with torch.device(workload.device):
        model = LlamaForCausalLM(transformers_config(workload.model))
    if weights is not None:
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
    if setting.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        out: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        return out

    return Peer(workload, setting, model, loss, model.model.layers)


def transformers_config(shape: ModelConfig) -> Any:
    """The shape as LlamaConfig has it."""
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.dim,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_seq_len,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_embeddings,
        "attn_implementation": "sdpa",
    }
    return LlamaConfig(**settings)


def litgpt(workload: Workload, setting: Setting, weights: Mapping[str, Tensor] | None) -> Peer:
    """litgpt's GPT, as a LLaMA, with the loss of its pretraining."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = workload.model
    config = Config(
        name="llama",
        block_size=workload.seq_len,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_query_groups=shape.kv_heads,
        n_embd=shape.dim,
        intermediate_size=shape.ffn_width,
        norm_class_name="RMSNorm",
        norm_eps=shape.norm_eps,
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        rope_base=int(shape.rope_theta),
        parallel_residual=False,
        bias=False,
    )
    with torch.device(workload.device):
        model = GPT(config)
    model.apply(model._init_weights)
    if weights is not None:
        model.load_state_dict(litgpt_names(weights, shape.n_layers, tied=shape.tied_embeddings), strict=True)
    if shape.tied_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    if setting["weights"] == "copies":  # as its own bf16-true has them
        model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    chunk = setting.get("loss_chunk", 0)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        out: Tensor = chunked_cross_entropy(model(inputs), targets, chunk_size=chunk)
        return out

    return Peer(workload, setting, model, loss, model.transformer.h)


def litgpt_names(weights: Mapping[str, Tensor], layers: int, *, tied: bool) -> dict[str, Tensor]:
    """Weights by Hugging Face's names under litgpt's, where query, key and value are one matrix."""
    inside = {
        "norm_1": "input_layernorm",
        "attn.proj": "self_attn.o_proj",
        "norm_2": "post_attention_layernorm",
        "mlp.fc_1": "mlp.gate_proj",
        "mlp.fc_2": "mlp.up_proj",
        "mlp.proj": "mlp.down_proj",
    }
    embedding = weights["model.embed_tokens.weight"]
    renamed = {
        "transformer.wte.weight": embedding,
        "lm_head.weight": embedding if tied else weights["lm_head.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
    }
    for i in range(layers):
        theirs, own = f"model.layers.{i}", f"transformer.h.{i}"
        renamed |= {f"{own}.{name}.weight": weights[f"{theirs}.{hf}.weight"] for name, hf in inside.items()}
        qkv = [weights[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        renamed[f"{own}.attn.qkv.weight"] = torch.cat(qkv)
    return renamed


def why_no_torchtitan() -> str:
    """torchtitan is to be measured where it can run; this says, in one line, why it is not here, on a CPU."""
    try:
        importlib.import_module("torchtitan.models.llama3")
    except Exception as error:  # not installed, or it does not import on this machine: both are the answer
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return "its language models take no sdpa, and the attention they take has no backward on a CPU"
