"""Admitted rows to tensors: right-padded micro-batches without an attention mask, and the alignment of both sides.

Right padding under causal attention is exact for real tokens, since they only look back; leaving the mask out keeps the
fused ``is_causal`` attention. An all-ones mask would cost a dense [B, 1, T, T] one.

With a hint of h tokens inserted at ``hint_at``, a token at position ``i >= hint_at`` of the student's row stands at
``i + h`` of the teacher's. Either side predicts it from the position before; that the token behind both positions is
the sampled one is checked token by token on every batch.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from agentsdpo.errors import HintError, LearnError
from agentsdpo.learn.records import LossTokens
from agentsdpo.learn.rows import LossRow


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward. B rows, S and S' padded lengths, N loss tokens.

    ``student_ids`` int64[B, S], ``teacher_ids`` int64[B, S']; ``student_pos``, ``teacher_pos`` int64[N] index the
    flattened rows at the position that predicts each loss token; ``seg`` int64[N] is its row in the micro-batch,
    ``staleness`` int64[N] that of its row.
    """

    student_ids: Tensor
    teacher_ids: Tensor
    student_pos: Tensor
    teacher_pos: Tensor
    tokens: LossTokens
    seg: Tensor
    staleness: Tensor


def loss_weights(rows: list[LossRow], normaliser: Literal["token", "episode"]) -> list[float]:
    """Weight of each loss token of each row, so that all weights of a step sum to 1. Counted before gates and masks.

    ``token``: one over all loss tokens. ``episode``: every episode weighs the same over all its branches.
    A token that is rejected later therefore shrinks the step instead of amplifying the others.
    """
    total = sum(len(row.position) for row in rows)
    if normaliser == "token":
        return [1.0 / total for _ in rows]
    per_episode: Counter[str] = Counter()
    for row in rows:
        per_episode[row.row.episode_id] += len(row.position)
    return [1.0 / (len(per_episode) * per_episode[row.row.episode_id]) for row in rows]


def microbatches(rows: list[LossRow], *, normaliser: Literal["token", "episode"], max_tokens: int,
                 device: torch.device | str = "cpu") -> list[MicroBatch]:
    """All micro-batches of one optimiser step, longest rows first.

    Args:
        rows: admitted rows.
        normaliser: see :func:`loss_weights`.
        max_tokens: padded teacher tokens of one micro-batch; a single longer row stands alone, never cut.
        device: where the tensors go.

    Raises:
        HintError: student and teacher rows do not agree on the scored tokens.
        LearnError: there are no rows.
    """
    if not rows:
        raise LearnError("no row is left to learn from", fix="collect fresh episodes or relax what refuses them")
    weights = loss_weights(rows, normaliser)
    order = sorted(range(len(rows)), key=lambda i: -rows[i].teacher_length)
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * rows[groups[-1][0]].teacher_length <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [collate([rows[i] for i in group], [weights[i] for i in group], device) for group in groups]


def collate(rows: list[LossRow], weights: list[float], device: torch.device | str = "cpu") -> MicroBatch:
    """One micro-batch of the given rows; ``weights`` holds one loss weight per row."""
    student = _pad([row.ids for row in rows])
    teacher = _pad([teacher_ids(row) for row in rows])
    counts = np.array([len(row.position) for row in rows])
    seg = np.repeat(np.arange(len(rows)), counts)
    at = np.concatenate([row.position for row in rows])
    shifted = np.concatenate([teacher_position(row) for row in rows])
    student_pos, teacher_pos = seg * student.shape[1] + at - 1, seg * teacher.shape[1] + shifted - 1
    tok = np.concatenate([row.ids[row.position] for row in rows]).astype(np.int64)
    _assert_aligned(student, teacher, student_pos, teacher_pos, tok)
    first_turn = np.cumsum([0, *(int(row.turn.max()) + 1 for row in rows[:-1])])
    temperature = np.concatenate([row.temperature for row in rows])

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    tokens = LossTokens(
        tok=put(tok), weight=put(np.repeat(np.array(weights, np.float32), counts)),
        turn=put(np.concatenate([row.turn for row in rows]) + first_turn[seg]),
        behaviour_logp=put(np.concatenate([row.behaviour_logp for row in rows])),
        temperature=put(temperature) if (temperature != 1.0).any() else None, kept=_kept(rows, device))
    return MicroBatch(student_ids=put(student), teacher_ids=put(teacher), student_pos=put(student_pos),
                      teacher_pos=put(teacher_pos), tokens=tokens, seg=put(seg),
                      staleness=put(np.repeat(np.array([row.staleness for row in rows]), counts)))


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


def _pad(rows: list[np.ndarray]) -> np.ndarray:
    """Rows side by side, int64[B, longest], zeros on the right (any id will do: no real token sees it)."""
    out = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for i, ids in enumerate(rows):
        out[i, :len(ids)] = ids
    return out


def _assert_aligned(student: np.ndarray, teacher: np.ndarray, student_pos: np.ndarray, teacher_pos: np.ndarray,
                    tok: np.ndarray) -> None:
    """Both rows hold the sampled token right behind the position that predicts it."""
    left, right = student.ravel()[student_pos + 1], teacher.ravel()[teacher_pos + 1]
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
