"""A spread model as one that answers questions: each rank with whole sequences of its own, or its group's.

Training cuts sequences among ranks (`parallel.context`, `parallel.tensor`), for which lengths must divide, and a
key-value cache has no place. Ranks that share sequences then simply have different ones; ranks that share layers all
have all tokens and add up what each has of a product.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from llamatrain.model.attention import Attend
from llamatrain.model.llama import Attention, Embedding, FeedForward, Head, Llama
from llamatrain.model.sharing import TensorParallel, WholeTokens
from llamatrain.parallel import fsdp


@contextmanager
def answering(model: Llama) -> Iterator[None]:
    """In here the model is in evaluation mode and takes sequences of any length, with a cache; then it is as before."""
    training, context = model.training, model.context
    attends = [(module, module.attend) for module in model.modules() if isinstance(module, Attention)]
    shared = [
        (module, module.sharing)
        for module in model.modules()
        if isinstance(module, (Attention, FeedForward, Embedding, Head))
    ]
    model.eval()
    if context is not None:
        model.context = None
        for module, attend in attends:
            module.attend = Attend(attend.backend)
    for layer, ranks in shared:
        if isinstance(ranks, TensorParallel):
            layer.sharing = WholeTokens(ranks.group, ranks.rank, ranks.size)
    try:
        yield
    finally:
        for module, attend in attends:
            module.attend = attend
        for layer, ranks in shared:
            layer.sharing = ranks
        model.context = context
        model.train(training)
        fsdp.free_gathered(model)
