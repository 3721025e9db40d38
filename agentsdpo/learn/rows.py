"""Which replay rows may train, and why the others may not. No torch: numpy and the record alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from agentsdpo.errors import TokenizerMismatch, TrainForbidden
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.prior import advantages
from agentsdpo.types import Branch, Call, TokenKind, staleness


@dataclass(frozen=True)
class TrainRow:
    """One branch as it is consumed, with the hint only the teacher reads.

    Args:
        branch: token-exact record; its ids are never re-rendered.
        hint_ids: rendered hint, None when the episode has none: then a mix learns from its grade alone, and nothing
            else from the row. The teacher reads ``ids[:hint_at] + hint_ids + ids[hint_at:]``.
        episode_id: branches of one attempt at an episode share it (normaliser, advantage).
        train_allowed: from the task's licence.
        hint_at: token index the hint is inserted at; 0 puts it in front.
        turns: those that carry loss, None for all; a branch with hints of single turns is a row for each of them, and
            these share the record.
        draw: how often the step had drawn the branch before; what is drawn twice counts twice (normaliser).
        tokenizer_sha256, chat_template_sha256: of the collecting engine; one value per step.
        score: grade of the episode, None when unscored; read by a mix with a policy gradient alone.
        group: attempts at one task share it (advantage ``grpo``).
        tool: bool[T], tokens of the agent's tool calls, None where they cannot be told.
        source: of the hint, for the numbers of a step.
        weight: on the row's share of the step, 1 unless the draw was not even (prioritised replay).
    """

    branch: Branch
    hint_ids: tuple[int, ...] | None
    episode_id: str
    train_allowed: bool
    hint_at: int = 0
    tokenizer_sha256: str = ""
    chat_template_sha256: str = ""
    score: float | None = None
    group: str = ""
    tool: np.ndarray | None = None
    source: str = ""
    weight: float = 1.0
    turns: frozenset[int] | None = None
    draw: int = 0


@dataclass(frozen=True)
class LossRow:
    """An admitted row: ids cut after the last loss token, and one entry per loss token (arrays of length n).

    ``position`` is the index of the loss token in ``ids``; ``turn`` counts the turns of this row from 0; ``age`` is the
    staleness of each token, ``staleness`` that of the oldest; ``advantage`` is that of the episode's grade.
    """

    row: TrainRow
    ids: np.ndarray
    position: np.ndarray
    turn: np.ndarray
    behaviour_logp: np.ndarray
    temperature: np.ndarray
    kept: tuple[np.ndarray, ...] | None
    staleness: int
    age: np.ndarray
    advantage: float = 0.0

    @property
    def teacher_length(self) -> int:
        """Tokens of the teacher's row."""
        return len(self.ids) + len(self.row.hint_ids or ())


@dataclass
class Admission:
    """Outcome of :func:`admit`: rows that train, refusals by reason, rows evicted for staleness, all staleness seen."""

    rows: list[LossRow] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    evicted: int = 0
    staleness: list[int] = field(default_factory=list)


def admit(rows: list[TrainRow], version: int, config: LearnConfig, *, window: int, vocab_size: int) -> Admission:
    """Refuse what cannot be trained on, then evict what is too stale; everything refused is counted by reason.

    Args:
        rows: as consumed; staleness is taken now, so time in a queue counts.
        version: the learner's policy version.
        config: its bound on staleness.
        window: longest teacher row in tokens. A longer row is refused: cutting it would lose scored tokens.
        vocab_size: ids of the model.

    Raises:
        TrainForbidden: a row's licence forbids training.
        TokenizerMismatch: rows of two tokenizers or templates, or an id the model does not have.
    """
    _one_tokenizer(rows, vocab_size)
    found, graded = Admission(), config.mix != "pure"
    credit = advantages(config.advantage, {row.episode_id: (row.group, row.score) for row in rows
                                           if row.score is not None}) if graded else {}
    for row in rows:
        loss = loss_mask(row.branch, row.turns)
        reason = refusal(row, loss, version, window, bare=graded)
        reason = reason or (_ungraded(row, credit, config) if graded else None)
        if reason:
            found.refused[reason] += 1
            continue
        age = staleness(version, loss_versions(row.branch, loss)[0])
        found.staleness.append(age)
        if config.max_staleness is not None and age > config.max_staleness:
            found.evicted += 1
        else:
            found.rows.append(_loss_row(row, loss, age, version, credit.get(row.episode_id, 0.0)))
    return found


def _ungraded(row: TrainRow, credit: Mapping[str, float], config: LearnConfig) -> str | None:
    """``unscored``; ``no_contrast``: the grade is all there is to learn from and it gives none."""
    if row.score is None:
        return "unscored"
    alone = config.mix in ("credit", "grade") or not row.hint_ids
    return "no_contrast" if alone and credit[row.episode_id] == 0.0 else None


def _one_tokenizer(rows: list[TrainRow], vocab_size: int) -> None:
    """One licence check, one tokenizer, one template, no foreign id."""
    for row in rows:
        if not row.train_allowed:
            raise TrainForbidden(f"episode {row.episode_id!r} is of a task that must not be trained on",
                                 fix="leave such episodes out of the sampler (train_allowed = true)")
        top = max(int(row.branch.token_ids.max(initial=0)), max(row.hint_ids or (0,)))
        if top >= vocab_size:
            raise TokenizerMismatch(f"episode {row.episode_id!r} holds id {top}, the model knows {vocab_size}",
                                    fix="collect with the tokenizer of the model that learns")
    for name in ("tokenizer_sha256", "chat_template_sha256"):
        values = sorted({getattr(row, name) for row in rows})
        if len(values) > 1:
            raise TokenizerMismatch(f"one batch holds {len(values)} values of {name}: {', '.join(values)}",
                                    fix="sample from runs of one model")


def usable(call: Call) -> bool:
    """Whether the stored log-prob is of the distribution the token was drawn from."""
    exact = call.logprob_kind == "tempered" and not call.sampling.truncated
    return call.logprob_kind == "processed" or exact


def loss_mask(branch: Branch, turns: frozenset[int] | None = None) -> np.ndarray:
    """Tokens that carry loss, bool[T]: those of kind 1, of all turns or of some."""
    loss = branch.token_kind == TokenKind.SAMPLED
    if turns is not None:
        for call in branch.calls:
            loss[call.start:call.end] &= call.turn in turns
    if len(loss):
        loss[0] = False  # nothing stands before the first token, so nothing predicts it
    return loss


def loss_versions(branch: Branch, loss: np.ndarray) -> tuple[int, int]:
    """Oldest and newest policy version that sampled a loss token."""
    versions = [span.version for call in branch.calls for span in call.versions
                if loss[call.start + span.start:call.start + span.end].any()]
    return min(versions), max(versions)


def refusal(row: TrainRow, loss: np.ndarray, version: int, window: int, *, bare: bool = False) -> str | None:
    """Why a row cannot be trained on, None when it can.

    ``no_hint`` (not where ``bare`` rows will do), ``no_tokens``, ``window``, ``version_unknown``, ``version_ahead`` (a
    token was sampled by a version the learner has not reached); and of the behaviour log-probs ``no_logprob``, ``raw``,
    ``unknown``, ``tempered``, ``count``, ``nan``, ``sentinel``, ``positive``, ``truncated`` (no kept set), ``greedy``.
    These hold for every objective: those without a ratio still report how far their data is. A log-prob of exactly 0 is
    none of them: the only token of a kept set has it, and so has whatever a confident model says, in float32.
    """
    branch = row.branch
    if not row.hint_ids and not bare:
        return "no_hint"
    if len(branch.logprobs) != len(branch.token_ids):
        return "count"
    if not loss.any():
        kinds = [_kind_reason(call) for call in branch.calls]
        return next((kind for kind in kinds if kind), "no_tokens")
    if int(np.flatnonzero(loss)[-1]) + 1 + len(row.hint_ids or ()) > window:
        return "window"
    oldest, newest = loss_versions(branch, loss)
    if oldest < 0:
        return "version_unknown"
    if newest > version:
        return "version_ahead"
    for call in branch.calls:
        if loss[call.start:call.end].any():
            reason = _call_refusal(branch, call, loss)
            if reason:
                return reason
    return None


def _kind_reason(call: Call) -> str | None:
    """The reason that the kind of a call's log-probs gives, None for a usable kind."""
    return None if usable(call) else {"none": "no_logprob"}.get(call.logprob_kind, call.logprob_kind)


def _call_refusal(branch: Branch, call: Call, loss: np.ndarray) -> str | None:
    """Why the behaviour log-probs of one call cannot be used, None when they can."""
    span = slice(call.start, call.end)
    logp = branch.logprobs[span][loss[span]]
    checks = [(~np.isfinite(logp), "nan"), (logp <= -1000.0, "sentinel"), (logp > 1e-4, "positive")]
    reason = _kind_reason(call) or next((name for bad, name in checks if bad.any()), None)
    if reason:
        return reason
    if call.sampling.temperature == 0.0:
        return "greedy"
    return "truncated" if call.sampling.truncated and branch.kept_counts is None else None


def _loss_row(row: TrainRow, loss: np.ndarray, oldest: int, version: int, advantage: float) -> LossRow:
    """Arrays of one admitted row; ``oldest`` is its staleness, ``version`` the learner's."""
    branch, position = row.branch, np.flatnonzero(loss)
    turn, temperature = np.zeros(len(loss), np.int64), np.ones(len(loss), np.float32)
    age = np.zeros(len(loss), np.int64)
    numbers: dict[int, int] = {}
    for call in branch.calls:
        span = slice(call.start, call.end)
        turn[span] = numbers.setdefault(call.turn, len(numbers))
        temperature[span] = call.sampling.temperature or 1.0  # 0 only where no token carries loss
        for one in call.versions:
            age[call.start + one.start:call.start + one.end] = version - one.version
    return LossRow(row=row, ids=branch.token_ids[:position[-1] + 1], position=position, turn=turn[position],
                   behaviour_logp=branch.logprobs[position], temperature=temperature[position],
                   kept=_kept(branch, loss), staleness=oldest, age=age[position], advantage=advantage)


def _kept(branch: Branch, loss: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Ids each loss token was drawn from (empty: not truncated), None when the branch has no kept sets."""
    if branch.kept_counts is None or branch.kept_ids is None:
        return None
    sampled = np.flatnonzero(np.isin(branch.token_kind, (TokenKind.SAMPLED, TokenKind.MASKED, TokenKind.UNUSABLE)))
    sets = np.split(branch.kept_ids, np.cumsum(branch.kept_counts)[:-1])
    return tuple(ids for at, ids in zip(sampled, sets, strict=True) if loss[at])
