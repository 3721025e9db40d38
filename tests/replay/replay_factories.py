"""Small episodes for the store's tests; also used by the child processes of the crash tests."""

import hashlib
from typing import Any

import numpy as np

from agentsdpo.replay import uuid7
from agentsdpo.types import Branch, Call, CriterionResult, Episode, Grade, Hint, Sampling, StopReason, VersionSpan

TOKENIZER = "a" * 64
VOCAB = 1000


def make_branch(rng: np.random.Generator, *, turns: int = 2, version: int | list[int] = 0, branch_id: int = 0,
                size: int = 200, kind: int = 1, sampling: Sampling | None = None, **fields: Any) -> Branch:
    """A branch of ``turns`` calls and about ``size`` tokens; ``version`` may be one per call."""
    ids, kinds, logps, calls = [], [], [], []
    piece = max(2, size // (2 * turns))
    for turn in range(turns):
        context = 0 if turn == 0 else 2
        ids += rng.integers(0, VOCAB, piece).tolist()
        kinds += [context] * piece
        logps += [np.nan] * piece
        start, now = len(ids), version if isinstance(version, int) else version[turn]
        prompt = hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()
        ids += rng.integers(0, VOCAB, piece).tolist()
        kinds += [kind] * piece
        logps += [np.nan] * piece if kind == 5 else (-rng.exponential(1.0, piece)).tolist()
        calls.append(Call(call_id=uuid7(), turn=turn, start=start, end=start + piece, prompt_sha256=prompt,
                          finish_reason="stop", sampling=sampling or Sampling(seed=turn),
                          versions=(VersionSpan(version=now, start=0, end=piece),)))
    return Branch(branch_id=branch_id, token_ids=np.array(ids, np.int32), token_kind=np.array(kinds, np.uint8),
                  logprobs=np.array(logps, np.float32), calls=tuple(calls), **fields)


def make_episode(seed: int = 0, *, episode_id: str | None = None, branches: tuple[Branch, ...] | None = None,
                 hint: bool = True, **fields: Any) -> Episode:
    """An episode of one branch with everything set; keyword arguments of the branch are turns, version and size."""
    rng = np.random.default_rng(seed)
    shape = {name: fields.pop(name) for name in ("turns", "version", "size", "kind", "sampling") if name in fields}
    results = [CriterionResult(id="unit", score=1.0), CriterionResult(id="file", score=0.0, feedback="no file")]
    values: dict[str, Any] = dict(
        episode_id=episode_id or uuid7(), task_id=f"task-{seed}", env_id="desk", run_id="run", group_id="g",
        group_size=4, branches=branches or (make_branch(rng, **shape),), stop_reason=StopReason.COMPLETED,
        grade=Grade.of(results, feedback="the file is missing"), train_allowed=True, model_id="tiny",
        tokenizer_sha256=TOKENIZER, chat_template_sha256="b" * 64, vocab_size=VOCAB, engine="inprocess",
        hint=Hint(text="write the file", source="feedback", author="grader") if hint else None,
        messages=({"role": "user", "content": "naïve \U0001f600"},), metadata={"z": 1, "a": [1.5, None]})
    return Episode(**(values | fields))


def same_branch(a: Branch, b: Branch) -> bool:
    """Equal in every field, arrays bit for bit with NaN equal to NaN."""
    arrays = ("token_ids", "token_kind", "logprobs", "kept_ids", "kept_counts")
    plain = [name for name in Branch.model_fields if name not in arrays]
    if any(getattr(a, name) != getattr(b, name) for name in plain):
        return False
    for name in arrays:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and (x.dtype != y.dtype or x.tobytes() != y.tobytes())):
            return False
    return True


def same_episode(a: Episode, b: Episode) -> bool:
    """Equal in every field, branches by :func:`same_branch`."""
    plain = [name for name in Episode.model_fields if name != "branches"]
    same = all(getattr(a, name) == getattr(b, name) for name in plain) and len(a.branches) == len(b.branches)
    return same and all(same_branch(x, y) for x, y in zip(a.branches, b.branches, strict=True))
