"""Healing over several GPUs, each of which holds a part of every tensor: PyTorch's `fully_shard`.

A block's weights are gathered just before they are used, and freed afterwards. Gradients are summed over the
processes, and each process keeps its part of them, of the trained weights and of the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint

from ffsplit.calibration.model_inputs import Batch, padded_batches
from ffsplit.healing.gradient import MEASURED_TOKENS, PassMemory, keep_best, meet, power_of_two
from ffsplit.healing.losses import Distance, last_states, quotient, whole
from ffsplit.healing.team import Team
from ffsplit.models.checkpoint import Checkpoint
from ffsplit.models.load import forget_caches, load_whole_model
from ffsplit.models.names import base_of
from ffsplit.models.streamed import load_in_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ffsplit.healing.loop import HealingState
    from ffsplit.healing.rows import HealingData


# A model that is divided while it is loaded, so that no process ever holds it whole.


@dataclass(frozen=True)
class Sharding:
    """How a model is divided among the processes of the default group: its blocks, and its head.

    Weights are gathered in the dtype `gathered`, None for their own. What lies outside of blocks and head
    stays whole in every process: embedding tables, which healing does not train and heads may be tied to, and
    a few norms, which are small.
    """

    device: torch.device
    gathered: torch.dtype | None = None

    @cached_property
    def _mesh(self) -> DeviceMesh:
        from torch import distributed
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (distributed.get_world_size(),))

    def divide(
        self, module: nn.Module, *, kept: Collection[nn.Parameter], stays_gathered: bool = False
    ) -> None:
        """Divide a module's parameters, but for those `kept` whole and those of parts divided already.

        If it `stays_gathered`, it is left so until it is told otherwise (`losses.whole`).
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(self.gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
        divided = fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=not stays_gathered,
            mp_policy=policy,
            ignored_params=set(kept),
        )
        if stays_gathered:
            divided.set_reshard_after_backward(False)

    def load(
        self,
        source: Checkpoint,
        class_name: str,
        *,
        dtype: torch.dtype,
        batch: Batch,
        prepare: Callable[[Any, str], object] = lambda model, block: None,
    ) -> Any:
        """A checkpoint's model, divided. `prepare` may change each block's modules before that.

        Blocks are read into the device one at a time. A model that does not run block by block is loaded
        into the host's memory first, whole in every process. A batch is run through the model at the end:
        torch lays the parts out at their first use, and the whole must be used before any part alone.
        """

        def divide(model: Any, block: str) -> None:
            module = base_of(model).get_submodule(block)
            prepare(model, block)
            self.divide(module, kept=tables_of(module))

        if source.can_stream:
            model = load_in_blocks(source, class_name, device=self.device, dtype=dtype, loaded=divide)
        else:
            model = load_whole_model(source.directory, class_name, dtype=dtype)
            for block in source.blocks:
                divide(model, block)
        forget_caches(model)
        base, head, tables = base_of(model), _head(model), tables_of(model)
        if head is not None and set(head.parameters()) - tables:
            self.divide(head, kept=tables, stays_gathered=True)
        self.divide(base, kept={each for each in base.parameters() if is_whole(each)})
        self._move_rest(model)
        with torch.no_grad(), whole(head), self.computing():
            last_states(model, batch)
        return model

    def computing(self) -> AbstractContextManager[object]:
        """Multiply in the dtype that weights are gathered in, in this context."""
        enabled = self.gathered is not None
        return torch.autocast(self.device.type, dtype=self.gathered or torch.bfloat16, enabled=enabled)

    def _move_rest(self, model: nn.Module) -> None:
        """Move what is not divided to the device."""
        for parameter in filter(is_whole, model.parameters()):
            parameter.data = parameter.data.to(self.device)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)


def tables_of(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of a module's embedding tables."""
    tables = [each for each in module.modules() if isinstance(each, nn.Embedding)]
    return {parameter for table in tables for parameter in table.parameters()}


def _head(model: Any) -> Any | None:
    """A causal language model's head, if it lies outside the base model."""
    head = model.get_output_embeddings()
    inside = any(module is head for module in base_of(model).modules())
    return None if inside else head


def checkpoint_blocks(model: Any, blocks: Sequence[str]) -> None:
    """Keep only the blocks' inputs for the backward pass, which computes each block once more."""
    for path in blocks:
        block = base_of(model).get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def gathered(tensor: Tensor) -> Tensor:
    """A divided tensor, whole in every process; all of them must ask for it."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


# Training a divided model.


@dataclass(frozen=True)
class ShardedDistillation:
    """A divided student's distance from its divided teacher, and this process's part of the weights.

    `weights` share their memory with the student's own, and their gradients are this process's part of the
    sum over all processes. Every process calls the same methods with the same arguments. As each call needs
    all processes, they compute equal numbers of passes and batches: one without work of its own repeats
    another's with weight zero.
    """

    distance: Distance
    parameters: Mapping[str, Tensor]
    weights: dict[str, Tensor]
    team: Team
    accelerator: Any
    blocks: tuple[str, ...]
    pass_tokens: int | None = None

    @classmethod
    def of(
        cls,
        distance: Distance,
        parameters: Mapping[str, Tensor],
        *,
        team: Team,
        accelerator: Any,
        blocks: Sequence[str],
    ) -> ShardedDistillation:
        weights: dict[str, Tensor] = {
            name: nn.Parameter(_part(parameter.detach())) for name, parameter in parameters.items()
        }
        return cls(distance, parameters, weights, team, accelerator, tuple(blocks))

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def _rank(self) -> int:
        (mine,) = self.team.mine
        return mine

    def meet(self, step: int) -> None:
        meet(self.team, step, device=self.device)

    def set_gradient(self, rows: Sequence[Sequence[int]], *, pad_id: int, accelerator: Any) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self.weights[name].grad = None
        shares = [rows[share :: self.team.size] for share in range(self.team.size)]
        passes = [self._passes(share or rows[:1], pad_id) for share in shares]
        mine, has_rows = passes[self._rank], bool(shares[self._rank])
        with torch.no_grad():
            targets = [self.distance.outputs(self.distance.teacher, batch.to(self.device)) for batch in mine]
            targets += [
                self.distance.outputs(self.distance.teacher, mine[0].to(self.device))
                for _ in range(len(mine), max(map(len, passes)))
            ]
        weight = torch.stack([*map(self.distance.weight, targets[: len(mine)])]).sum() * float(has_rows)
        # fully_shard divides the sum over the processes by their number
        factor = self.team.size * has_rows / self.team.sum([weight])
        for index, target in enumerate(targets):
            is_mine = index < len(mine)
            self.distance.backward(
                mine[index if is_mine else 0].to(self.device),
                target,
                factor=factor * float(is_mine),
                accelerator=accelerator,
            )
        self._take_gradients()

    def _passes(self, rows: Sequence[Sequence[int]], pad_id: int) -> list[Batch]:
        tokens = self.pass_tokens or len(rows) * max(map(len, rows))
        return list(padded_batches(rows, batch_tokens=tokens, pad_id=pad_id))

    def _take_gradients(self) -> None:
        """Let the weights have this process's part of the gradients. Whole parameters' are summed here."""
        from torch import distributed

        for name, parameter in self.parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                continue
            if is_whole(gradient):
                gradient /= self.team.size
                distributed.all_reduce(gradient)
            self.weights[name].grad = _part(gradient)

    def clip(self, max_norm: float, *, accelerator: Any) -> None:
        from torch import distributed

        counted = [
            each.grad
            for name, each in self.weights.items()
            if each.grad is not None and (self._rank == 0 or not is_whole(self.parameters[name]))
        ]
        total = torch.zeros((), device=self.device)
        if counted:
            total += get_total_norm(counted).square()
        distributed.all_reduce(total)
        clip_grads_with_norm_(self.weights.values(), max_norm, total.sqrt())

    def judge(self, state: HealingState, batches: Sequence[Batch]) -> None:
        mine = list(batches[self._rank :: self.team.size])
        with self.accelerator.autocast():
            totals = self.distance.totals(mine)
            for _ in range(len(mine), -(-len(batches) // self.team.size)):
                self.distance.totals(batches[:1])
        sums = torch.tensor(totals, dtype=torch.float64, device=self.device)
        keep_best(state, quotient(*self.team.sum([sums]).tolist()), self.weights, device=torch.device("cpu"))

    def agree(self, is_due: bool) -> bool:
        from torch import distributed

        told = torch.tensor(int(is_due), device=self.device)
        distributed.broadcast(told, src=0)
        return bool(told)

    def in_passes(self, data: HealingData, *, step_tokens: int, accelerator: Any) -> ShardedDistillation:
        if self.device.type != "cuda":
            return self
        longest = max(data.rows, key=len)
        share = step_tokens / self.team.size
        tokens = self._fitting(longest, 2, data.pad_id)
        if tokens < share:
            checkpoint_blocks(self.distance.student, self.blocks)
            tokens = self._fitting(longest, max(2, MEASURED_TOKENS // len(longest)), data.pad_id)
        return replace(self, pass_tokens=power_of_two(tokens))

    def _fitting(self, row: Sequence[int], most: int, pad_id: int) -> float:
        """How many tokens fit into one pass in every process, by passes of one row and of `most` rows."""
        from torch import distributed

        one, more = (
            PassMemory.measured(
                self,
                self.weights,
                [row] * num * self.team.size,
                pad_id=pad_id,
                accelerator=self.accelerator,
            )
            for num in (1, most)
        )
        of_token = max(1.0, (more.taken - one.taken) / ((most - 1) * len(row)))
        fixed = max(0.0, one.taken - of_token * len(row))
        fitting = torch.tensor((more.free - fixed) / of_token, dtype=torch.float64, device=self.device)
        distributed.all_reduce(fitting, op=distributed.ReduceOp.MIN)
        return float(fitting)


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is not divided."""
    return not hasattr(tensor, "to_local")


def _part(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor, or a whole tensor itself."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()
