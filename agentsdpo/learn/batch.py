"""Admitted rows to tensors: branches packed side by side without padding, and the alignment of both sides.

With a hint of h tokens inserted at ``hint_at``, a token at position ``i >= hint_at`` of the student's branch stands at
``i + h`` of the teacher's. Either side predicts it from the position before; that the token behind both positions is
the sampled one is checked token by token on every batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agentsdpo.errors import HintError, LearnError
from agentsdpo.learn.config import LearnConfig
from agentsdpo.learn.pack import PackedRow, RowCost, pack, packed_row
from agentsdpo.learn.prior import decay_factor, shares, skip_factor, span_factor
from agentsdpo.learn.records import LossTokens
from agentsdpo.learn.rows import LossRow


@dataclass(frozen=True)
class MicroBatch:
    """Branches of one forward, N loss tokens.

    ``student`` and ``teacher`` hold the branches in the same order; ``student_pos``, ``teacher_pos`` int64[N] index
    them at the position that predicts each loss token; ``seg`` int64[N] is its branch in the micro-batch, ``staleness``
    int64[N] that of its branch; ``rows`` are the branches themselves.
    """

    student: PackedRow
    teacher: PackedRow
    student_pos: Tensor
    teacher_pos: Tensor
    tokens: LossTokens
    seg: Tensor
    staleness: Tensor
    rows: list[LossRow]


def loss_weights(rows: list[LossRow], config: LearnConfig) -> list[np.ndarray]:
    """Weight of each loss token of each row, float32[n] per row: its share of the step times what is known beforehand.

    Shares are counted over all rows of the step, before gates and masks; see :mod:`agentsdpo.learn.prior`. A branch or
    an episode that was drawn twice is two of them.

    Args:
        rows: all rows of the step.
        config: ``normaliser``, ``loss_tokens``; ``tool_weight``, ``skip_first``, ``staleness_decay``.
    """
    counts = [len(row.position) for row in rows]
    episodes = {(row.row.episode_id, row.row.draw): i for i, row in enumerate(rows)}
    own = [(row.row.episode_id, id(row.row.branch), row.row.draw) for row in rows]  # rows of its turns share a branch
    branches = {one: i for i, one in enumerate(own)}
    turns = np.cumsum([0, *(int(row.turn.max()) + 1 for row in rows)])
    turn = np.concatenate([row.turn + first for row, first in zip(rows, turns, strict=False)])
    weight = shares(config.normaliser, turn=turn,
                    branch=np.repeat([branches[one] for one in own], counts),
                    episode=np.repeat([episodes[row.row.episode_id, row.row.draw] for row in rows], counts),
                    loss_tokens=config.loss_tokens or 1)
    weight = weight * np.repeat([row.row.weight for row in rows], counts)
    if config.tool_weight != 1.0:
        weight = weight * span_factor(np.concatenate([_tool(row) for row in rows]), config.tool_weight)
    if config.skip_first:
        weight = weight * skip_factor(turn, config.skip_first)
    if config.staleness_decay < 1.0:
        weight = weight * decay_factor(np.concatenate([row.age for row in rows]), config.staleness_decay)
    return np.split(weight.astype(np.float32), np.cumsum(counts)[:-1])


def _tool(row: LossRow) -> np.ndarray:
    """Which loss tokens belong to a tool call, bool[n]."""
    if row.row.tool is None:
        raise LearnError(f"learn.tool_weight needs to know the tool calls of episode {row.row.episode_id!r}",
                         fix="give TrainRow.tool, or set learn.tool_weight to 1")
    return row.row.tool[row.position]


def microbatches(rows: list[LossRow], config: LearnConfig, cost: RowCost,
                 device: torch.device | str = "cpu") -> list[MicroBatch]:
    """All micro-batches of one optimiser step, each of at most ``forward_tokens`` of the teacher and alike in cost.

    Args:
        rows: admitted rows.
        config: of :func:`loss_weights`; ``forward_tokens``.
        cost: of a branch by its length, see :func:`~agentsdpo.learn.pack.row_cost`.
        device: where the tensors go.

    Raises:
        HintError: student and teacher rows do not agree on the scored tokens.
        LearnError: there are no rows, one is longer than a forward, or tool calls are weighted but not known.
    """
    if not rows:
        raise LearnError("no row is left to learn from", fix="collect fresh episodes or relax what refuses them")
    weights = loss_weights(rows, config)
    bins = pack([row.teacher_length for row in rows], config.forward_tokens, cost)
    return [collate([rows[i] for i in own], [weights[i] for i in own], device) for own in bins]


def collate(rows: list[LossRow], weights: list[np.ndarray], device: torch.device | str = "cpu") -> MicroBatch:
    """One micro-batch of the given rows; ``weights`` holds the loss weights of each, float32[n]."""
    student = np.concatenate([row.ids for row in rows])
    hinted = [teacher_ids(row) for row in rows]
    teacher = np.concatenate(hinted)
    counts = np.array([len(row.position) for row in rows])
    seg = np.repeat(np.arange(len(rows)), counts)
    at = np.concatenate([row.position for row in rows])
    shifted = np.concatenate([teacher_position(row) for row in rows])
    first, first_hinted = (np.cumsum([0, *map(len, side[:-1])])[seg] for side in ([row.ids for row in rows], hinted))
    student_pos, teacher_pos = first + at - 1, first_hinted + shifted - 1
    tok = np.concatenate([row.ids[row.position] for row in rows]).astype(np.int64)
    _assert_aligned(student, teacher, student_pos, teacher_pos, tok)
    first_turn = np.cumsum([0, *(int(row.turn.max()) + 1 for row in rows[:-1])])
    temperature = np.concatenate([row.temperature for row in rows])

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    tokens = LossTokens(
        tok=put(tok), weight=put(np.concatenate(weights)), branch=put(seg),
        turn=put(np.concatenate([row.turn for row in rows]) + first_turn[seg]),
        behaviour_logp=put(np.concatenate([row.behaviour_logp for row in rows])),
        age=put(np.concatenate([row.age for row in rows])),
        advantage=put(np.repeat(np.array([row.advantage for row in rows], np.float32), counts)),
        hinted=None if all(row.row.hint_ids for row in rows) else put(np.repeat(
            np.array([bool(row.row.hint_ids) for row in rows]), counts)),
        temperature=put(temperature) if (temperature != 1.0).any() else None, kept=_kept(rows, device))
    return MicroBatch(student=packed_row([row.ids for row in rows], device), teacher=packed_row(hinted, device),
                      student_pos=put(student_pos), teacher_pos=put(teacher_pos), tokens=tokens, seg=put(seg),
                      staleness=put(np.repeat(np.array([row.staleness for row in rows]), counts)), rows=rows)


def alone(row: LossRow, device: torch.device | str = "cpu") -> MicroBatch:
    """The micro-batch of one row whose loss tokens weigh 1 each: to look at it."""
    return collate([row], [np.ones(len(row.position), np.float32)], device)


def teacher_ids(row: LossRow) -> np.ndarray:
    """The teacher's row: the student's ids with the hint inserted and nothing else changed, int32[T + h]."""
    hint, at = np.array(row.row.hint_ids or (), np.int32), row.row.hint_at
    if not 0 <= at <= row.position[-1]:
        raise HintError(f"hint of episode {row.row.episode_id!r} stands at token {at}, behind the last loss token "
                        f"{row.position[-1]}", fix="insert the hint in front of the turns it speaks of")
    return np.concatenate([row.ids[:at], hint, row.ids[at:]])


def teacher_position(row: LossRow) -> np.ndarray:
    """Index of each loss token in the teacher's row."""
    return row.position + np.where(row.position >= row.row.hint_at, len(row.row.hint_ids or ()), 0)


def _assert_aligned(student: np.ndarray, teacher: np.ndarray, student_pos: np.ndarray, teacher_pos: np.ndarray,
                    tok: np.ndarray) -> None:
    """Both rows hold the sampled token right behind the position that predicts it."""
    left, right = student[student_pos + 1], teacher[teacher_pos + 1]
    wrong = np.flatnonzero((left != tok) | (right != tok))
    if len(wrong):
        i = int(wrong[0])
        raise HintError(f"loss token {i} is {tok[i]} but the student's row holds {left[i]}, the teacher's {right[i]}",
                        fix="the hint must be inserted whole, and nothing else may change in the teacher's row")


def _kept(rows: list[LossRow], device: torch.device | str) -> Tensor | None:
    """Kept sets int64[N, K] padded with -1, None when no row was truncated."""
    if all(row.kept is None for row in rows):
        return None
    none: tuple[np.ndarray, ...]
    sets: list[np.ndarray] = []
    for row in rows:
        none = tuple(np.empty(0, np.int64) for _ in row.position)
        sets.extend(row.kept if row.kept is not None else none)
    out = np.full((len(sets), max(1, *(len(ids) for ids in sets))), -1, np.int64)
    for i, ids in enumerate(sets):
        out[i, :len(ids)] = ids
    return torch.from_numpy(out).to(device)
