"""Meta's released files: consolidated.NN.pth, one for each model-parallel shard, params.json and tokenizer.model.

How fairscale's layers cut a tensor: ColumnParallelLinear by its output, dimension 0; RowParallelLinear by its input,
dimension 1; ParallelEmbedding by its width, dimension 1 (VocabParallelEmbedding, of Llama 3, by the vocabulary); norms
are on every shard. The names are those of this program. The head is never tied there: a tied one is written twice,
and one that equals the embedding bit for bit is read as tied.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatrain.arithmetic import parameter_shapes
from llamatrain.checkpoint.interchange import pickles
from llamatrain.checkpoint.interchange.source import (
    Cast,
    Region,
    Source,
    check_regions,
    check_shapes,
    checked_model,
    number,
    read_json,
    shown,
    whole,
)
from llamatrain.config.convert import MOST_SHARDS
from llamatrain.config.model import ModelConfig
from llamatrain.errors import CheckpointError, ConfigError
from llamatrain.files import sha256_of_json
from llamatrain.tokenizer import TOKENIZER_FILE

PARAMS_FILE = "params.json"
KNOWN = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "max_seq_len", "max_batch_size", "use_scaled_rope",
}  # fmt: skip
PAPER_LENGTH = 2048  # the files do not say it
BY_OUTPUT = ("wq", "wk", "wv", "w1", "w3", "output")
BY_INPUT = ("wo", "w2")
EMBEDDING, HEAD, QUERIES = "tok_embeddings.weight", "output.weight", "layers.0.attention.wq.weight"
FREQUENCIES = "rope.freqs"
FREQUENCIES_ANYWHERE = re.compile(r"(layers\.\d+\.attention\.inner_attention\.)?rope\.freqs")  # 7B has them in layers


def looks_like(path: Path) -> bool:
    """Others have a params.json, too, beside files of Hugging Face's kind."""
    return any(path.glob("consolidated.*.pth")) or (
        (path / PARAMS_FILE).is_file() and not (path / "config.json").is_file()
    )


def cut_dimension(name: str) -> int | None:
    """The dimension along which shards have their parts of a parameter; None: each has all of it."""
    layer = name.split(".")[-2]
    if layer in BY_OUTPUT:
        return 0
    return 1 if layer in BY_INPUT or name == EMBEDDING else None


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width as the released code computes it."""
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True, kw_only=True)
class MetaSource(Source):
    """The shards of a directory."""

    shards: list[dict[str, Region]]
    embedding_dimension: int

    def dtype_of(self, name: str) -> torch.dtype:
        return self.shards[0][name].dtype

    def read(self, name: str) -> Tensor:
        parts = [shard[name] for shard in self.shards]
        dimension = self.embedding_dimension if name == EMBEDDING else cut_dimension(name)
        if dimension is None:
            return self._same_everywhere(name, parts)
        if len(parts) == 1:
            return parts[0].read()
        tensor = torch.empty(parameter_shapes(self.model)[name], dtype=parts[0].dtype)
        for part, here in zip(parts, tensor.chunk(len(parts), dimension), strict=True):
            here.copy_(part.read())
        return tensor

    def _same_everywhere(self, name: str, parts: list[Region]) -> Tensor:
        tensor = parts[0].read()
        for part in parts[1:]:
            if not torch.equal(tensor, part.read()):
                raise CheckpointError(f"{part.path}: {name} is not that of {parts[0].path.name}: of different models?")
        return tensor


def open_source(path: Path, *, max_seq_len: int | None) -> MetaSource:
    """A directory of released files, its sizes and shapes checked. Raises CheckpointError."""
    found = set(path.glob("consolidated.*.pth"))
    files = [path / f"consolidated.{i:02d}.pth" for i in range(max(1, len(found)))]
    if missing := [file for file in files if file not in found]:
        raise CheckpointError(f"{missing[0]}: missing, so the shards of {path} are not complete")
    shards = [pickles.read_header(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        check_regions(shard)
        if shard.keys() != shards[0].keys():
            names = min(shard.keys() ^ shards[0].keys())
            raise CheckpointError(f"{file}: it and {files[0].name} have not the same tensors ({names})")
    params = read_json(path / PARAMS_FILE)
    model = _model_of(params, path / PARAMS_FILE, shards, max_seq_len)
    _take_frequencies(shards, model)
    dimension = _check_parts(path, shards, model)
    sizes = {file.name: file.stat().st_size for file in files}
    source = MetaSource(
        path=path,
        model=model,
        shards=shards,
        embedding_dimension=dimension,
        tokenizer=_tokenizer_of(path),
        origin={"format": "meta", "shards": len(files), "files": sizes, "params_sha256": sha256_of_json(params)},
    )
    return replace(source, model=replace(model, tied_embeddings=True)) if _is_tied(source) else source


def _model_of(
    params: Mapping[str, Any], where: Path, shards: list[dict[str, Region]], max_seq_len: int | None
) -> ModelConfig:
    """The shape that params.json and the first shard's tensors describe. Raises CheckpointError."""
    if params.get("use_scaled_rope"):
        raise CheckpointError(f"{where}: use_scaled_rope (Llama 3.1 and later) is not what this program computes")
    if unknown := sorted(params.keys() - KNOWN):
        raise CheckpointError(
            f"{where}: {unknown[0]} is not known, so the model may be another than a LLaMA; known are "
            f"{', '.join(sorted(KNOWN))}"
        )
    first = shards[0]
    for name in (EMBEDDING, HEAD, QUERIES):
        if name not in first or len(first[name].shape) != 2:
            raise CheckpointError(f"{where.parent}: {name} is missing in the first shard, or is no matrix")
    dim, heads = whole(params, "dim", where), whole(params, "n_heads", where)
    _refuse_another_count(len(shards), dim, first[QUERIES])
    kv_heads = whole(params, "n_kv_heads", where, heads)
    multiplier = number(params, "ffn_dim_multiplier", where) if params.get("ffn_dim_multiplier") is not None else None
    multiple_of = whole(params, "multiple_of", where, 256)
    width = ffn_width(dim, multiple_of, multiplier)
    usual = multiplier is None and width == replace(ModelConfig(), dim=dim, ffn_multiple_of=multiple_of).ffn_width
    model = ModelConfig(
        dim=dim,
        n_layers=whole(params, "n_layers", where),
        n_heads=heads,
        n_kv_heads=None if kv_heads == heads else kv_heads,
        ffn_dim=None if usual else width,
        ffn_multiple_of=multiple_of,
        vocab_size=first[HEAD].shape[0] * len(shards),
        max_seq_len=max_seq_len or whole(params, "max_seq_len", where, PAPER_LENGTH),
        rope_theta=number(params, "rope_theta", where, 10000.0),
        norm_eps=number(params, "norm_eps", where, 1e-5),
    )
    if params.get("vocab_size", -1) not in (-1, None, model.vocab_size):
        raise CheckpointError(
            f"{where}: vocab_size is {shown(params['vocab_size'])}, the head has {model.vocab_size} rows"
        )
    return checked_model(model, where, tensors=len(first))


def _refuse_another_count(count: int, dim: int, queries: Region) -> None:
    """Raises CheckpointError if the rows of wq, of which the model has `dim`, are of more shards than there are."""
    rows = queries.shape[0]
    cut = dim // rows if rows and dim % rows == 0 else count
    if count < cut <= MOST_SHARDS:
        raise CheckpointError(
            f"{queries.path.parent}: dim is {dim} and {QUERIES} has {rows} rows in a shard, so the weights were cut "
            f"into {cut} shards, and {count} {'is' if count == 1 else 'are'} there: is consolidated.{count:02d}.pth "
            "missing?"
        )


def _check_parts(path: Path, shards: list[dict[str, Region]], model: ModelConfig) -> int:
    """The dimension by which the embedding is cut; refuses shards that are not the model cut so."""
    count, dimension = len(shards), 1
    if shards[0][EMBEDDING].shape[1] == model.dim:
        dimension = 0
    for shard in shards:
        wanted = {}
        for name, shape in parameter_shapes(model).items():
            cut = dimension if name == EMBEDDING else cut_dimension(name)
            if cut is not None and shape[cut] % count:
                raise CheckpointError(f"{path}: {name}, of shape {list(shape)}, does not divide into {count} shards")
            wanted[name] = tuple(size // count if i == cut else size for i, size in enumerate(shape))
        check_shapes({name: region.shape for name, region in shard.items()}, wanted, next(iter(shard.values())).path)
        for name, region in shard.items():
            if region.dtype != shards[0][name].dtype:
                raise CheckpointError(f"{region.path}: {name} is {region.dtype}, and not in the first shard")
    return dimension


def frequencies_of(model: ModelConfig) -> Tensor:
    """The rotary frequencies of a head: fp64 [K/2]."""
    pairs = torch.arange(model.head_dim // 2, dtype=torch.float64)
    return model.rope_theta ** (-2 * pairs / model.head_dim)


def _take_frequencies(shards: list[dict[str, Region]], model: ModelConfig) -> None:
    """Take out the rotary frequencies that released files hold; they must be those of rope_theta."""
    for shard in shards:
        for name in [name for name in shard if FREQUENCIES_ANYWHERE.fullmatch(name)]:
            region = shard.pop(name)
            if region.shape != (model.head_dim // 2,) or not torch.allclose(
                region.read().double(), frequencies_of(model), rtol=1e-2, atol=1e-6
            ):
                raise CheckpointError(f"{region.path}: {name} are not those of rope_theta={model.rope_theta}")


def _is_tied(source: MetaSource) -> bool:
    """Whether the head is the embedding, bit for bit."""
    embedding, head = source.shards[0][EMBEDDING], source.shards[0][HEAD]
    if embedding.dtype != head.dtype:
        return False
    beginning = (min(embedding.shape[1], head.shape[1]),)
    if not torch.equal(replace(embedding, shape=beginning).read(), replace(head, shape=beginning).read()):
        return False
    return torch.equal(source.read(EMBEDDING), source.read(HEAD))


def _tokenizer_of(path: Path) -> Path | None:
    """The released 7B to 65B share one, in the folder above."""
    places = [where / TOKENIZER_FILE for where in (path, path.absolute().parent)]
    return next((place for place in places if place.is_file()), None)


# ---------------------------------------------------------------------- writing


def check_shards(model: ModelConfig, shards: int) -> None:
    """Raises ConfigError if a model cannot be cut into so many parts."""
    sizes = {
        "heads": model.n_heads,
        "key-value heads": model.kv_heads,
        "feed-forward channels": model.ffn_width,
        "token ids": model.vocab_size,
        "channels": model.dim,
    }
    for what, size in sizes.items():
        if size % shards:
            works = [n for n in range(1, 257) if all(count % n == 0 for count in sizes.values())]
            raise ConfigError(f"shards={shards}: the model's {size} {what} do not divide; possible: {works}")


def written_bytes(weights: Cast, shards: int) -> int:
    """Bytes of the tensors of all shards together."""
    total = 0
    for name, shape in parameter_shapes(replace(weights.source.model, tied_embeddings=False)).items():
        copies = shards if cut_dimension(name) is None else 1
        total += copies * math.prod(shape) * weights.dtype_of(_read_as(name, weights.source.model)).itemsize
    return total


def write(directory: Path, weights: Cast, *, shards: int, told: Callable[[int], None]) -> None:
    """Write a source's weights as so many shards. `told` hears the bytes written."""
    model = weights.source.model
    shapes = parameter_shapes(replace(model, tied_embeddings=False))
    frequencies = frequencies_of(model).float()
    described = {
        name: (weights.dtype_of(_read_as(name, model)), _part(name, shape, shards)) for name, shape in shapes.items()
    }
    described[FREQUENCIES] = (torch.float32, tuple(frequencies.shape))
    with ExitStack() as files:
        writers = [
            files.enter_context(pickles.Writer(directory / f"consolidated.{i:02d}.pth", described))
            for i in range(shards)
        ]
        for name in shapes:
            tensor, cut = weights.read(_read_as(name, model)), cut_dimension(name)
            parts = [tensor] * shards if cut is None else tensor.chunk(shards, cut)
            for writer, part in zip(writers, parts, strict=True):
                writer.add(name, part)
                told(part.nbytes)
        for writer in writers:
            writer.add(FREQUENCIES, frequencies)
    (directory / PARAMS_FILE).write_text(json.dumps(params_of(model)) + "\n", encoding="utf-8")


def _read_as(name: str, model: ModelConfig) -> str:
    return EMBEDDING if name == HEAD and model.tied_embeddings else name


def _part(name: str, shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    cut = cut_dimension(name)
    return tuple(size // shards if i == cut else size for i, size in enumerate(shape))


def params_of(model: ModelConfig) -> dict[str, Any]:
    """params.json of a model; of its fields only those that the first released code knew, where they are enough."""
    multiple_of, multiplier = _width_rule(model)
    content = {
        "dim": model.dim,
        "multiple_of": multiple_of,
        "n_heads": model.n_heads,
        "n_layers": model.n_layers,
        "norm_eps": model.norm_eps,
        "vocab_size": model.vocab_size,
    }
    if model.kv_heads != model.n_heads:
        content["n_kv_heads"] = model.kv_heads
    if multiplier is not None:
        content["ffn_dim_multiplier"] = multiplier
    if model.rope_theta != 10000.0:
        content["rope_theta"] = model.rope_theta
    return content


def _width_rule(model: ModelConfig) -> tuple[int, float | None]:
    """multiple_of and ffn_dim_multiplier that give the feed-forward width: the roundest multiplier that does."""
    width = model.ffn_width
    unit = width & -width  # the largest power of two that divides it
    units = [n for n in (model.ffn_multiple_of, unit) if width % n == 0]
    for multiple_of in units:
        if ffn_width(model.dim, multiple_of, None) == width:
            return multiple_of, None
    ratio = width / int(2 * (4 * model.dim) / 3)
    for digits in range(1, 16):
        below = math.floor(ratio * 10**digits) / 10**digits
        for multiplier in (round(below, digits), round(below + 10**-digits, digits)):
            for multiple_of in units:
                if ffn_width(model.dim, multiple_of, multiplier) == width:
                    return multiple_of, multiplier
    raise CheckpointError(f"no multiple_of and ffn_dim_multiplier give a feed-forward width of {width}")
