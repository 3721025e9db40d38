"""Several processes, one learner: rows are dealt out or shared, and the step is that of one process.

Every process is given the same rows and counts shares, bounds and metrics over all of them; the statistics of the loss
tokens are gathered, so that what follows a forward (clipper, gates' counts, teacher, report) is the same everywhere
without further agreement. All run the same number of forwards: one that has no rows left runs another one's first row
with weight 0. The gradient is the sum over processes.

``shard`` is FSDP2, called directly: on a CPU, accelerate takes its plugin and silently trains plain copies. Forwards
run inside the root module that the weights are gathered for, head and loss included. In each process of a launch by
``torchrun --nproc-per-node 2``::

    ranks = join_ranks(config.parallel)                      # ranks = 2; refused when it is not so
    learner = Learner(model, config, ranks=ranks)
    report = learner.step(rows, version)                     # the same rows everywhere
    save_checkpoint(folder, learner, version=version)        # everywhere; the first process writes
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agentsdpo.errors import LearnError
from agentsdpo.learn.batch import MicroBatch, collate, loss_weights
from agentsdpo.learn.config import LearnConfig, ParallelConfig
from agentsdpo.learn.load import pick_device
from agentsdpo.learn.longcontext import decoder_layers
from agentsdpo.learn.pack import RowCost, pack
from agentsdpo.learn.records import Head, LossTokens, TokenStats, whole
from agentsdpo.learn.rows import LossRow
from agentsdpo.learn.sdpo import objective
from agentsdpo.learn.ulysses import local_row
from agentsdpo.learn.weights import Bounds, reads_turns

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What one process computes of a step.

    ``batches`` are its forwards, of which the first ``real`` count and the others keep the processes in step; ``rows``
    are those of all processes, in the order their statistics are gathered.
    """

    batches: list[MicroBatch]
    real: int
    rows: list[LossRow]


class Ranks:
    """The processes of one learner; :func:`join_ranks` makes them.

    Args:
        group: all processes; None for one alone.
        sequence: processes share every row instead of being dealt rows.
        device: of this process's learner.
    """

    def __init__(self, group: Any = None, *, sequence: bool = False, device: torch.device | str = "cpu") -> None:
        self.group, self.sequence, self.device = group, sequence, device
        self.size: int = group.size() if group else 1
        self.rank: int = group.rank() if group else 0

    def share(self, rows: list[LossRow], config: LearnConfig, cost: RowCost, device: torch.device | str) -> Share:
        """Pack the rows of a step and take this process's forwards.

        Raises:
            LearnError: the processes were given different rows; what ``microbatches`` of ``learn/batch.py`` raises.
        """
        self._same(rows)
        weights = loss_weights(rows, config)
        dealt = 1 if self.sequence else self.size
        bins = pack([row.teacher_length for row in rows], config.forward_tokens, cost, multiple=dealt)
        if dealt > 1:  # forwards of one round are alike in cost
            bins.sort(key=lambda own: -sum(cost(rows[i].teacher_length) for i in own))
        hands = [bins[rank::dealt] for rank in range(dealt)]
        mine = hands[self.rank if dealt > 1 else 0]
        batches = [collate([rows[i] for i in own], [weights[i] for i in own], device) for own in mine]
        filler = min(range(len(rows)), key=lambda i: rows[i].teacher_length)
        batches += [collate([rows[filler]], [np.zeros_like(weights[filler])], device)
                    for _ in range(len(hands[0]) - len(mine))]
        if self.sequence:
            batches = [replace(batch, student=local_row(batch.student, self.group),
                               teacher=local_row(batch.teacher, self.group)) for batch in batches]
        return Share(batches, len(mine), [rows[i] for hand in hands for own in hand for i in own])

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes; the same bits everywhere."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value, group=self.group)
        return value

    def first(self, act: Callable[[], None]) -> None:
        """Do something on the first process alone; all wait for it.

        Raises:
            LearnError: it failed; on every process but the first, which raises what it met.
        """
        error: Exception | None = None
        if self.rank == 0:
            try:
                act()
            except Exception as caught:  # noqa: BLE001  whatever it is, the others wait for this process
                error = caught
        failed = self.size > 1 and bool(self.sum(torch.tensor(float(error is not None), device=self._device)))
        if error is not None:
            raise error
        if failed:
            raise LearnError("process 0 of this learner failed", fix="see what it says, and start again")

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sum gradients of unsharded parameters over the processes; sharded ones were summed in the backward."""
        for p in parameters if self.size > 1 else []:
            if p.grad is not None and not isinstance(p.grad, DTensor):
                dist.all_reduce(p.grad, group=self.group)

    def objective(self, student: Head, teacher: Head, tokens: LossTokens, config: LearnConfig,
                  bounds: Bounds) -> tuple[Tensor, TokenStats]:
        """This process's share of the loss of ``learn/sdpo.py``, and the statistics of all its tokens.

        Processes that share a row take a part of its loss tokens each. Where a weight needs whole turns, all take all
        of them and an equal share of the loss.
        """
        if not self.sequence or self.size == 1:
            return objective(student, teacher, tokens, config, bounds)
        n = len(tokens.tok)
        if reads_turns(config) or n < self.size:
            loss, stats = objective(student, teacher, tokens, config, bounds)
            return loss / self.size, stats
        own = slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)
        loss, stats = objective(Head(student.hidden[own], student.weight), Head(teacher.hidden[own], teacher.weight),
                                tokens.at(own), config, bounds)
        return loss, self.gather(stats)

    def collect(self, share: Share, parts: list[TokenStats]) -> TokenStats:
        """Statistics of a step, in the order of ``share.rows``, from those of this process's forwards."""
        own = TokenStats.cat([part if i < share.real else part.none() for i, part in enumerate(parts)])
        return own if self.sequence else self.gather(own)

    def gather(self, stats: TokenStats) -> TokenStats:
        """Statistics of all processes, one after the other."""
        if self.size == 1:
            return stats
        names = [f.name for f in fields(stats)]
        table = torch.stack([getattr(stats, name).to(torch.float64) for name in names])
        counts = [torch.zeros(1, dtype=torch.int64, device=table.device) for _ in range(self.size)]
        dist.all_gather(counts, counts[0].new_tensor([table.shape[1]]), group=self.group)
        wide = max(int(count) for count in counts)
        parts = [table.new_empty(len(names), wide) for _ in range(self.size)]
        dist.all_gather(parts, nn.functional.pad(table, (0, wide - table.shape[1])), group=self.group)
        whole = torch.cat([part[:, :int(count)] for part, count in zip(parts, counts, strict=True)], 1)
        return TokenStats(**{name: row.to(getattr(stats, name).dtype) for name, row in zip(names, whole, strict=True)})

    @property
    def _device(self) -> str:
        """Where tensors that are sent must lie."""
        return "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"

    def _same(self, rows: list[LossRow]) -> None:
        """All processes hold the same rows: counted over different ones, shares would be wrong and nothing say so."""
        if self.size == 1:
            return
        digest = sha256(b"".join(row.ids.tobytes() + row.row.episode_id.encode() for row in rows)).digest()
        own = torch.frombuffer(bytearray(digest[:8]), dtype=torch.int64)
        own = own.to(self._device)
        seen = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(seen, own, group=self.group)
        other = [rank for rank in range(self.size) if not torch.equal(seen[rank], seen[0])]
        if other:
            raise LearnError(f"processes {other} of {self.size} were given other rows than process 0",
                             fix="draw the rows of a step with the same sampler state everywhere")


class Inside(nn.Module):
    """The root that sharded weights are gathered for: what runs inside its forward finds embedding and head whole."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, compute: Callable[[], T]) -> T:
        """The result of ``compute``."""
        return compute()


_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: the first one may be collecting episodes."""


def join_ranks(config: ParallelConfig, device: torch.device | str | None = None) -> Ranks:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started.

    Args:
        config: what was asked for.
        device: a CPU's processes speak gloo, a GPU's NCCL; None takes a GPU where there is one.

    Raises:
        LearnError: there are more or fewer processes than were asked for, or they are not connected.
    """
    where = torch.device(device) if device else pick_device()
    if config.ranks == 1 and os.environ.get("WORLD_SIZE", "1") == "1":
        return Ranks(device=where)
    from accelerate.state import PartialState  # one second to import
    from accelerate.utils import DistributedType

    cpu = where.type == "cpu"
    state = PartialState(cpu=cpu, timeout=_PATIENCE)  # without cpu=True, processes without GPU are not connected
    several = DistributedType.MULTI_CPU if cpu else DistributedType.MULTI_GPU
    check_launch(config, processes=state.num_processes, kind=state.distributed_type.value,
                 wanted=(DistributedType.NO if config.ranks == 1 else several).value)
    return Ranks(dist.group.WORLD if config.ranks > 1 else None, sequence=config.sequence, device=state.device or where)


def check_launch(config: ParallelConfig, *, processes: int, kind: str, wanted: str) -> None:
    """Refuse a launch that is not what was asked for: each process would train alone and never say so.

    Raises:
        LearnError: another number of processes, or another kind of connection.

    >>> check_launch(ParallelConfig(ranks=2), processes=1, kind="NO", wanted="MULTI_CPU")
    Traceback (most recent call last):
    agentsdpo.errors.LearnError: learn.parallel.ranks is 2 but there is 1 process, connected as NO, not MULTI_CPU; ...
    """
    if processes != config.ranks or kind != wanted:
        there = f"there {'is 1 process' if processes == 1 else f'are {processes} processes'}"
        raise LearnError(f"learn.parallel.ranks is {config.ranks} but {there}, connected as {kind}, not {wanted}",
                         fix="start as many with accelerate launch --multi_gpu --num_processes (with --cpu it starts "
                             "one), or set learn.parallel.ranks to theirs")


def shard(models: list[Any], ranks: Ranks) -> Inside:
    """Spread the weights of models over the processes with FSDP2, layer by layer.

    Args:
        models: student, and the teacher's own where it has one; their parameters become DTensors in place.
        ranks: at least two.

    Returns:
        The root; every forward of these models must run inside its own.

    Raises:
        LearnError: a parameter is not spread over all processes afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(models[0].parameters()).device.type, (ranks.size,))
    root = Inside(models)
    for model in models:
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    missed = [name for name, p in root.named_parameters()
              if not isinstance(p, DTensor) or p.device_mesh.size() != ranks.size]
    if missed:
        raise LearnError(f"{len(missed)} parameters are not spread over {ranks.size} processes, first {missed[0]!r}",
                         fix="set learn.parallel.shard to false")
    return root


def gathered(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors for the parts in a state dict; what the model ties is one tensor again."""
    same = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[int, Tensor] = {}
    for name, tensor in weights.items():
        key = same.get(name, id(tensor))
        found[key] = found[key] if key in found else whole(tensor)
    return {name: found[same.get(name, id(tensor))] for name, tensor in weights.items()}
