"""The names and layout that Hugging Face transformers (LlamaForCausalLM) has our weights in.

The names differ, and so do the rows of wq and wk: there rotary pairs are channels (i, i + K/2) of a head,
here they are (2i, 2i + 1) as in the released files. Without that permutation a converted model runs and is
wrong.
"""

from torch import Tensor

from llamatrain.config.model import ModelConfig

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
