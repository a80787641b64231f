"""Pipeline parallelism: ranks have some of the layers each, and hidden states travel from stage to stage.

A stage is the whole model less what lies on others. Layers keep their numbers, so parameters keep their names, and
neither initial weights nor checkpoints know of the split. All ranks of a pipeline load the same samples: tokens,
targets and documents are everywhere, hidden states [B, T, D] and their gradients are all that is sent.

When a stage works on which micro-batch is a schedule of torch.distributed.pipelining: GPipe (Huang et al., arXiv
1811.06965) or 1F1B (Narayanan et al., arXiv 1806.03377, its synchronous form). Both run the backwards in the order of
micro-batches, so gradients are added up as without a pipeline. Either way a stage waits for the others
(pp - 1) / (micro-batches + pp - 1) of the time. GPipe keeps the activations of all micro-batches, and on the last
stage a gradient of the head for each, which the loss makes in its forward; 1F1B those of pp at most, and one.

torch's own way with FSDP is to keep gradients whole until the last micro-batch and reduce them after it, when nothing
is left to hide that behind. Here the model is hidden from it: FSDP's hooks do in each backward what they do without a
pipeline, and `parallel.reduce_scatter` and `all_reduce` mean the same.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

from llamatrain.config.parallel import ParallelConfig, stage_layers
from llamatrain.model.llama import Llama
from llamatrain.parallel import fsdp

SCHEDULES = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}

MicroBatch = tuple[Tensor, Tensor, Sequence[int] | None]  # inputs and targets int64 [B, T], document lengths


def keep_stage(model: Llama, mesh: DeviceMesh) -> None:
    """Leave of a model on the meta device what this rank's stage has; `mesh` is the pp axis."""
    stage, stages = mesh.get_local_rank(), mesh.size()
    kept = stage_layers(model.config.n_layers, stages)[stage]
    model.layers = nn.ModuleDict({name: block for name, block in model.layers.items() if int(name) in kept})
    if stage > 0:
        model.tok_embeddings = None
    if stage < stages - 1:
        model.norm = model.output = None


class OneStage:
    """A rank that has all layers: a step's micro-batches one after the other."""

    def __init__(self, model: Llama, settings: ParallelConfig) -> None:
        self.model, self.settings = model, settings

    def accumulate(self, micro_batches: Sequence[MicroBatch], valid_targets: int | Tensor) -> Tensor:
        """Add the gradient of their loss, a sum divided by `valid_targets`, to the parameters'.

        Returns the loss, an fp32 scalar: of a pipeline's stages, the last one's is the loss, that of others 0.
        """
        loss = self._nothing()
        for number, (inputs, targets, doc_lengths) in enumerate(micro_batches, start=1):
            fsdp.begin_micro_batch(self.model, self.settings, last=number == len(micro_batches))
            micro_loss = self.model(inputs, targets=targets, doc_lengths=doc_lengths) / valid_targets
            micro_loss.backward()
            loss += micro_loss.detach()
        return loss

    def loss(self, inputs: Tensor, *, targets: Tensor, doc_lengths: Sequence[int] | None = None) -> Tensor:
        """The sum of the targets' losses, without gradients: an fp32 scalar, 0 on all stages but the last."""
        out: Tensor = self.model(inputs, targets=targets, doc_lengths=doc_lengths)
        return out

    def remark(self, micro_batches: int) -> str:
        """What a person should know of a step of so many micro-batches, to follow on its description."""
        return ""

    def _nothing(self) -> Tensor:
        return torch.zeros((), device=self.model.rope_cos.device)


class Pipeline(OneStage):
    """A rank that has one stage of several. All ranks of a pipeline call the same with the same micro-batches."""

    def __init__(self, model: Llama, settings: ParallelConfig, mesh: DeviceMesh, *, tokens_shared_by: int) -> None:
        """`mesh` is the pp axis. A hidden state has the tokens of one of `tokens_shared_by` ranks (tp, cp)."""
        super().__init__(model, settings)
        self.group, self.stage, self.stages = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.tokens_shared_by = tokens_shared_by
        self._schedule: PipelineScheduleSingle | None = None
        self._made_for: tuple[int, torch.Size] | None = None  # number and shape of micro-batches
        self._coming: Iterator[MicroBatch] = iter(())  # to the stage's forward, which torch calls in this order
        self._valid_targets: int | Tensor = 1

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def accumulate(self, micro_batches: Sequence[MicroBatch], valid_targets: int | Tensor) -> Tensor:
        self._coming, self._valid_targets = iter(micro_batches), valid_targets
        losses: list[Tensor] = []
        # torch hands each micro-batch's part of `target` to the loss; ours have gone into the model
        target = torch.zeros(len(micro_batches)) if self.last else None
        try:
            self._schedule_for(micro_batches).step(target=target, losses=losses, return_outputs=False)
        except RuntimeError as error:
            if error.__cause__ is None:
                raise
            raise error.__cause__ from None  # torch wraps what a stage raises, and its words are lost
        return sum((loss.detach() for loss in losses), start=self._nothing())

    def loss(self, inputs: Tensor, *, targets: Tensor, doc_lengths: Sequence[int] | None = None) -> Tensor:
        hidden = None
        if not self.first:
            hidden = self._hidden(inputs.shape, inputs.device)
            dist.recv(hidden, group=self.group, group_src=self.stage - 1)
        out: Tensor = self.model(inputs, targets=targets, doc_lengths=doc_lengths, hidden=hidden)
        if self.last:
            return out
        dist.send(out, group=self.group, group_dst=self.stage + 1)
        return self._nothing()

    def remark(self, micro_batches: int) -> str:
        idle = (self.stages - 1) / (micro_batches + self.stages - 1)
        return f", by {self.settings.pipeline_schedule}, in which a stage waits {idle:.0%} of the time"

    def _hidden(self, tokens: torch.Size, device: torch.device | str) -> Tensor:
        """Memory for what travels, [B, T / tokens_shared_by, D], of tokens of shape [B, T]."""
        batch, length = tokens
        shape = batch, length // self.tokens_shared_by, self.model.config.dim
        return torch.empty(shape, dtype=self.model.compute_dtype, device=device)

    def _schedule_for(self, micro_batches: Sequence[MicroBatch]) -> PipelineScheduleSingle:
        """The schedule of so many micro-batches; kept, with the memory that torch receives each of them in."""
        inputs = micro_batches[0][0]
        made_for = len(micro_batches), inputs.shape
        if self._schedule is None or self._made_for != made_for:
            hidden = self._hidden(inputs.shape, "meta").requires_grad_()
            stage = _Stage(
                _Call(self._forward),
                self.stage,
                self.stages,
                inputs.device,
                input_args=() if self.first else (hidden,),
                output_args=(torch.empty((), device="meta", requires_grad=True),) if self.last else (hidden,),
                group=self.group,
            )
            stage.before_backward = self._before_backward
            self._schedule = SCHEDULES[self.settings.pipeline_schedule](
                stage, len(micro_batches), loss_fn=self._divided, scale_grads=False
            )
            self._made_for = made_for
        return self._schedule

    def _forward(self, *hidden: Tensor) -> Tensor:
        inputs, targets, doc_lengths = next(self._coming)
        out: Tensor = self.model(inputs, targets=targets, doc_lengths=doc_lengths, hidden=hidden[0] if hidden else None)
        return out

    def _divided(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss / self._valid_targets

    def _before_backward(self, last: bool) -> None:
        fsdp.begin_micro_batch(self.model, self.settings, last=last)


class _Stage(PipelineStage):
    """torch's stage, saying when a backward begins."""

    before_backward: Callable[[bool], None]  # told whether it is the step's last

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self.before_backward(last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=full_backward, last_backward=last_backward)


class _Call(nn.Module):
    """A function in the place of a module: torch does not see that there is FSDP behind it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)
