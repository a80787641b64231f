"""Weights in the names and layout of Hugging Face transformers (LlamaForCausalLM), and back.

The names differ, and so do the rows of wq and wk: there rotary pairs are channels (i, i + K/2) of a head,
here they are (2i, 2i + 1) as in the released files. Without that permutation a converted model runs and is
wrong.
"""

from collections.abc import Mapping

from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.config.model import ModelConfig
from llamatrain.errors import CheckpointError

HF_TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
HF_IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of one of our parameters."""
    if name in HF_TOP:
        return HF_TOP[name]
    _, layer, inside = name.split(".", 2)
    return f"model.layers.{layer}.{HF_IN_LAYER[inside.removesuffix('.weight')]}.weight"


def to_hf_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our whole state under Hugging Face's names. Raises CheckpointError if it does not fit `config`."""
    _check_fits(state, {name: name for name in parameter_shapes(config)}, config)
    return {hf_name(name): pairs_to_halves(name, tensor, config) for name, tensor in state.items()}


def from_hf_state_dict(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse. Tables of rotary frequencies in old files, and the copy of a tied head, are left out.

    Raises CheckpointError if the state does not fit `config`.
    """
    names = {name: hf_name(name) for name in parameter_shapes(config)}
    left_out = {"lm_head.weight"} if config.tied_embeddings else set()
    kept = {k: v for k, v in state.items() if not k.endswith("rotary_emb.inv_freq") and k not in left_out}
    _check_fits(kept, names, config)
    return {name: halves_to_pairs(name, kept[theirs], config) for name, theirs in names.items()}


def _check_fits(state: Mapping[str, Tensor], names: Mapping[str, str], config: ModelConfig) -> None:
    """Refuse a state that is not exactly the parameters of `config`, known in it by `names`."""
    missing = sorted(set(names.values()) - set(state))
    unknown = sorted(set(state) - set(names.values()))
    if missing or unknown:
        problem = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model does not have"
        raise CheckpointError(f"the weights do not fit the model configuration: the state {problem}")
    for ours, shape in parameter_shapes(config).items():
        found = tuple(state[names[ours]].shape)
        if found != shape:
            raise CheckpointError(
                f"the weights do not fit the model configuration: {names[ours]} is {found}, not {shape}"
            )


def pairs_to_halves(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """One of our parameters in Hugging Face's layout: the rows of wq and wk permuted, any other as it is."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return tensor
    heads = tensor.unflatten(0, (-1, config.head_dim // 2, 2))  # [H, K/2, 2, D]
    return heads.transpose(1, 2).reshape(tensor.shape)


def halves_to_pairs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The inverse; `name` is ours."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return tensor
    heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))  # [H, 2, K/2, D]
    return heads.transpose(1, 2).reshape(tensor.shape)
