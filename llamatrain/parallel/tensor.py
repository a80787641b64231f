"""Tensor parallelism with sequence parallelism: ranks share every layer, its weights and its tokens.

What a rank has of each weight is told here; what it does with it, in `llamatrain.model.sharing`. Each weight becomes
a DTensor over the `tp` axis, which FSDP then shards further; so initial weights, checkpoints and the gradient's norm
need not know. All ranks of a tp group see the same samples.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from llamatrain.model.llama import Attention, Embedding, FeedForward, Head, Llama
from llamatrain.model.sharing import TensorParallel

ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()
PLACEMENTS: dict[str, Placement] = dict.fromkeys(("tok_embeddings", "output", "wq", "wk", "wv", "w1", "w3"), ROWS)
PLACEMENTS |= dict.fromkeys(("wo", "w2"), COLUMNS) | dict.fromkeys(("attention_norm", "ffn_norm", "norm"), WHOLE)


def share_layers(model: Llama, mesh: DeviceMesh) -> None:
    """Let the ranks of `mesh`, the tp axis, share the layers of a model on the meta device."""
    ranks = TensorParallel(mesh.get_group(), rank=mesh.get_local_rank(), size=mesh.size())
    for name, parameter in list(model.named_parameters()):
        module = model.get_submodule(name.rpartition(".")[0])
        placement = PLACEMENTS[name.split(".")[-2]]
        module.weight = nn.Parameter(distribute_tensor(parameter, mesh, [placement], src_data_rank=None))
    for module in model.modules():
        if isinstance(module, (Attention, FeedForward, Embedding, Head)):
            module.sharing = ranks
