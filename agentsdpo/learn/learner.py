"""One optimiser step over replay rows: admit, batch, score, weigh, backward, update, report."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from agentsdpo.errors import LearnError, NotFinite, NothingToLearn
from agentsdpo.learn.adapters import adapter_config, adapter_weights, add_adapter, merged_weights
from agentsdpo.learn.batch import MicroBatch
from agentsdpo.learn.clipper import AdvantageClip
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.control import control_metrics
from agentsdpo.learn.diagnostics import component_norms, staleness_metrics, step_metrics
from agentsdpo.learn.longcontext import save_memory
from agentsdpo.learn.masters import make_optimizer
from agentsdpo.learn.model import longest_row, moved, prepare_model, scores
from agentsdpo.learn.pack import row_cost
from agentsdpo.learn.parallel import Ranks, Share, gathered, shard
from agentsdpo.learn.ratio import m2po_bound
from agentsdpo.learn.records import Head, TokenStats, sampled_logp, whole
from agentsdpo.learn.rows import Admission, LossRow, TrainRow, admit
from agentsdpo.learn.splits import split_metrics
from agentsdpo.learn.teacher import GatedTeacher, SnapshotTeacher, Teacher, make_teacher
from agentsdpo.learn.weights import Bounds

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """What one step did: ``n_trained`` rows and ``n_tokens`` loss tokens trained, rows refused by reason and evicted.

    ``metrics`` holds plain floats under ``learn/`` and ``replay/`` keys; ``step`` counts from 1; ``gaps`` holds the
    trained rows with the mean ``|gap|`` of each in nats: what prioritised replay goes by.
    """

    step: int
    version: int
    metrics: dict[str, float]
    n_trained: int
    n_tokens: int
    refused: dict[str, int]
    evicted: int
    gaps: tuple[tuple[TrainRow, float], ...]


class Learner:
    """Owns student, teacher, optimiser and clipper.

    Args:
        model: student, a causal language model of transformers; moved to ``device`` in ``learn.dtype`` and trained
            in place.
        config: objective, teacher, optimiser.
        teacher: None makes the one ``config.teacher`` names, from the model's present weights.
        device: of student and tensors.
        ranks: the processes of this learner; each makes one of its own from the same model and configuration, and calls
            what the others call. None is one process.

    Raises:
        ModelError: a model that cannot be learnt with, see :func:`~agentsdpo.learn.model.prepare_model`.
        LearnError: ``learn.parallel.ranks`` are wanted, but there are others.
    """

    def __init__(self, model: Any, config: LearnConfig, *, teacher: Teacher | None = None,
                 device: torch.device | str = "cpu", ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        if self.ranks.size != config.parallel.ranks:
            raise LearnError(f"learn.parallel.ranks is {config.parallel.ranks} but the learner was given "
                             f"{self.ranks.size}", fix="launch as many processes with torchrun, and join them")
        self.model = moved(model, device, getattr(torch, config.dtype))  # in eval mode: no dropout, both sides
        prepare_model(self.model)
        self.cost = row_cost(self.model)
        if config.adapter.rank:
            add_adapter(self.model, config.adapter)
        save_memory(self.model, config)
        self.window = min(longest_row(self.model), config.forward_tokens)
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.config, self.device, self.step_count = config, device, 0
        if config.parity:
            _log.warning("learn.parity is on: this objective repeats a known flaw, compare with it alone")
        self.teacher = teacher or make_teacher(self.model, config)
        own = [m for m in (self.model, getattr(self.teacher, "model", None)) if m is not None]
        self._root = shard(list(dict.fromkeys(own)), self.ranks) if config.parallel.shard else None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, lr=config.lr, betas=config.betas,
                                        weight_decay=config.weight_decay)
        self.clipper = AdvantageClip(config.adv_clip, config.adv_decay) if config.adv_clip is not None else None
        self.teacher_held = self._told_long = False

    def step(self, rows: list[TrainRow], version: int) -> StepReport:
        """One update from the given rows.

        Args:
            rows: branches with hints, as consumed.
            version: the learner's policy version, for staleness.

        Raises:
            NothingToLearn: no row is left, every token is masked or gated, or the gradient is exactly 0.
            NotFinite: loss or gradient is not. Weights, optimiser, clipper and teacher are then as before.
            TrainForbidden, TokenizerMismatch, HintError: see :func:`~agentsdpo.learn.rows.admit` and ``batch.py``.
        """
        found = self.admit(rows, version)
        if not found.rows:
            alike = found.refused["no_contrast"] > max(found.evicted, found.refused.total() // 2)
            fix = "collect fresh episodes, raise learn.max_staleness, or mend what refuses the rows"
            raise NothingToLearn(f"none of {len(rows)} rows can be trained on: {found.evicted} evicted as staler than "
                                 f"{self.config.max_staleness}, refused {dict(found.refused)}",
                                 reason="alike" if alike else "refused", fix=_ALIKE if alike else fix)
        share = self.ranks.share(found.rows, self.config, self.cost, self.device)
        self.model.eval()
        control = self._control(found.rows)
        bounds = self._bounds(share)
        try:
            loss, stats = self._backward(share, bounds)
            norms = self._update(stats)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self._after(stats, _hinted(share.rows))
        metrics = step_metrics(stats, _per_token(share.rows, "staleness", stats.gap), self.config,
                               bounds.gap if self.clipper else None)
        metrics |= split_metrics(stats, share.rows, self.config)
        metrics |= norms | control | staleness_metrics(found.staleness)
        metrics |= {"learn/loss": loss, "learn/microbatches": float(len(share.batches))}
        metrics["learn/lr"] = self.optimizer.param_groups[0]["lr"]
        if isinstance(self.teacher, SnapshotTeacher | GatedTeacher):
            metrics["teacher/refreshes"] = float(self.teacher.copies)
        metrics |= {f"replay/refused/{reason}": float(count) for reason, count in found.refused.items()}
        return StepReport(step=self.step_count, version=version, metrics=metrics, n_trained=len(found.rows),
                          n_tokens=len(stats.gap), refused=dict(found.refused), evicted=found.evicted,
                          gaps=_gaps(share.rows, stats.gap))

    def admit(self, rows: list[TrainRow], version: int) -> Admission:
        """Rows this learner may train on at this version, and why not the others."""
        found = admit(rows, version, self.config, window=self.window, vocab_size=self.vocab_size)
        if found.refused["window"] and not self._told_long:  # once: the metric goes on counting
            self._told_long = True
            _log.warning("%d of %d branches are not learnt from: with their hint they are longer than the %d tokens of "
                         "learn.forward_tokens or of the model's window", found.refused["window"], len(rows),
                         self.window)
        return found

    def restrain(self, *, lr_factor: float, hold_teacher: bool) -> None:
        """Until told otherwise, step at ``learn.lr`` times a factor, with a teacher that takes over nothing new.

        A live teacher and the live part of a trust region are the student, and go with it all the same.
        """
        self.teacher_held = hold_teacher
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor

    def policy(self) -> dict[str, Tensor]:
        """Weights to publish, by the names of a model without adapter: an adapter's product is added in.

        Of sharded weights every process gets all, and every process must ask.
        """
        if self._root is None:
            return merged_weights(self.model)
        return gathered(self.model, merged_weights(self.model))

    def adapter(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Factors and configuration of the adapter, as peft writes them; None where the full weights are trained.

        Of sharded weights every process gets all, and every process must ask.
        """
        if not self.config.adapter.rank:
            return None
        factors = adapter_weights(self.model)
        return factors if self._root is None else gathered(self.model, factors), adapter_config(self.model)

    def objective(self, batch: MicroBatch, bounds: Bounds) -> tuple[Tensor, TokenStats]:
        """Loss and statistics of one micro-batch; the teacher first, so that its activations are gone in time."""
        return self._inside(lambda: self._objective(batch, bounds))

    def _objective(self, batch: MicroBatch, bounds: Bounds) -> tuple[Tensor, TokenStats]:
        tokens = batch.tokens
        if self.config.beta_kl:
            tokens = replace(tokens, reference_logp=sampled_logp(self.teacher.reference(batch), tokens))
        teacher = None if self.config.mix == "grade" else self.teacher.scores(batch)
        student = scores(self.model, batch.student, batch.student_pos)
        if teacher is None:  # nobody reads a hint: a gap of 0, without a forward for it
            teacher = Head(student.hidden.detach(), student.weight.detach())
        return self.ranks.objective(student, teacher, tokens, self.config, bounds)

    def _inside(self, compute: Callable[[], T]) -> T:
        """The result of something that runs forwards, where sharded weights can be read."""
        return compute() if self._root is None else self._root(compute)

    def _control(self, rows: list[LossRow]) -> dict[str, float]:
        """Controls on the hints of this step, where it is time for them: the first step, then every so often."""
        every = self.config.control_every
        hinted = [row for row in rows if row.row.hint_ids]
        if not every or self.step_count % every or not hinted:
            return {}
        return self._inside(lambda: control_metrics(self.model, self.teacher, hinted, self.config, seed=self.step_count,
                                                    window=self.window))

    def _bounds(self, share: Share) -> Bounds:
        """What holds for the whole step: the gap's bound is of the steps before.

        The first of them, and every bound of m2po, take one scoring of all tokens beforehand.
        """
        clipper, m2 = self.clipper, self.config.ratio == "m2po"
        if not m2 and (clipper is None or not clipper.needs_first_mean):
            return Bounds(gap=clipper.bound()) if clipper else Bounds()
        with torch.no_grad():
            seen = self.ranks.collect(share, [self.objective(batch, Bounds())[1] for batch in share.batches])
        signal = seen.gap if self.config.mix == "pure" else _per_token(share.rows, "advantage", seen.gap)
        first_mean = float(seen.gap.abs().sum()) / max(_hinted(share.rows), 1)
        return Bounds(gap=clipper.bound(first_mean=first_mean) if clipper else Bounds.gap,
                      m2=m2po_bound(seen.log_ratio, signal, budget=self.config.m2_budget) if m2 else Bounds.m2)

    def _backward(self, share: Share, bounds: Bounds) -> tuple[float, TokenStats]:
        """Accumulate the gradient of the whole step; the loss and the statistics of all its tokens."""
        total, parts = 0.0, []
        for batch in share.batches:
            loss, stats = self.objective(batch, bounds)
            value = self.ranks.sum(loss.detach()).item()
            if not math.isfinite(value):  # on every process at once, so that none waits for another
                raise NotFinite(f"the loss of step {self.step_count + 1} is {value}, nothing was updated",
                                fix="lower learn.lr, or look for broken log-probs in the rows of this step")
            (loss if self._root is None else loss * self.ranks.size).backward()  # FSDP2 takes the mean of gradients
            total += value
            parts.append(stats)
        self.ranks.sum_gradients(self.parameters)
        return total, self.ranks.collect(share, parts)

    def _update(self, stats: TokenStats) -> dict[str, float]:
        """Clip and step; the gradient norms before clipping."""
        if not (stats.gate & stats.mask).any():
            raise NothingToLearn(f"all {len(stats.gap)} loss tokens of step {self.step_count + 1} are masked "
                                 f"({int((~stats.mask).sum())}) or gated ({int((~stats.gate).sum())}), nothing was "
                                 "updated", reason="gated",
                                 fix="the rows are too far from the student: lower learn.max_staleness or learn.lr")
        norms = component_norms(self.model)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)))
        if norm == 0.0:
            raise NothingToLearn(f"the gradient of step {self.step_count + 1} is 0: none of its {len(stats.gap)} loss "
                                 "tokens has both a weight and something to learn, nothing was updated",
                                 reason="no_gradient", fix="lower learn.skip_first, raise learn.tool_weight, or look "
                                                           "whether the hints say anything")
        if norm != norm or norm == float("inf"):
            raise NotFinite(f"the gradient norm of step {self.step_count + 1} is {norm}, nothing was updated",
                            fix="lower learn.lr, or look for broken log-probs in the rows of this step")
        self.optimizer.step()
        return {"learn/grad_norm": norm, **norms}

    def _after(self, stats: TokenStats, hinted: int) -> None:
        """Bookkeeping of a step that went through, ``hinted`` of whose tokens have a gap."""
        self.step_count += 1
        if not self.teacher_held:
            self.teacher.after_step(self.model)
        if self.clipper is not None and hinted:
            self.clipper.update(float(stats.gap.abs().sum()), hinted)


_ALIKE = ("the attempts compared are graded alike, so there is nothing to learn from grades: end the run if all pass, "
          "or give tasks that some attempts pass and some do not")


def _hinted(rows: list[LossRow]) -> int:
    """Loss tokens with a hint: those without one, in a mix, have a gap of 0 and no part in the mean |gap|."""
    return sum(len(row.position) for row in rows if row.row.hint_ids)


def _gaps(rows: list[LossRow], gap: Tensor) -> tuple[tuple[TrainRow, float], ...]:
    """Mean |gap| of each row."""
    each = gap.detach().abs().split([len(row.position) for row in rows])
    return tuple((row.row, float(own.mean())) for row, own in zip(rows, each, strict=True))


def _per_token(rows: list[LossRow], name: str, like: Tensor) -> Tensor:
    """A number of each row, once per loss token, [N]; ``like`` says where and, for a float, of which kind."""
    values = torch.tensor([getattr(row, name) for row in rows], device=like.device)
    return values.repeat_interleave(torch.tensor([len(row.position) for row in rows], device=like.device))
