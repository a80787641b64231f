"""A model's whole state as Hugging Face's LlamaForCausalLM names and lays it out, and back."""

from collections.abc import Mapping

from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint.interop import halves_to_pairs, hf_name, pairs_to_halves
from llamatrain.config.model import ModelConfig


def to_hugging_face(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    return {hf_name(name): pairs_to_halves(name, tensor, config) for name, tensor in state.items()}


def from_hugging_face(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    return {name: halves_to_pairs(name, state[hf_name(name)], config) for name in parameter_shapes(config)}
