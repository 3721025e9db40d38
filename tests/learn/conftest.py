"""Rows and heads for the learner's tests: random but repeatable, with the record's rules kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.learn.records import Head, LossTokens
from agentsdpo.learn.rows import TrainRow
from agentsdpo.types import Branch, Call, Sampling, VersionSpan

torch.set_num_threads(1)


def build_row(*, seed: int = 0, prompt: int = 6, turns: tuple[tuple[int, int], ...] = ((4, 3), (3, 2)),
              hint: tuple[int, ...] | None = (11, 12, 13), hint_at: int = 0, versions: tuple[int, ...] = (0, 0),
              episode: str = "e", logp: float = -5.0, sampling: Sampling | None = None, kind: str = "processed",
              kept: bool = False, vocab: int = 300) -> TrainRow:
    """One row: a prompt, then per turn ``(sampled, tool)`` tokens; turn ``i`` is sampled by ``versions[i]``."""
    rng = np.random.default_rng(seed)
    n = prompt + sum(a + b for a, b in turns)
    ids, kinds = rng.integers(20, vocab, n).astype(np.int32), np.zeros(n, np.uint8)
    logps, calls, at = np.full(n, np.nan, np.float32), [], prompt
    for i, (sampled, tool) in enumerate(turns):
        end = at + sampled
        kinds[at:end], kinds[end:end + tool], logps[at:end] = 1, 2, logp
        calls.append(Call(call_id=f"c{i}", turn=i, start=at, end=end, prompt_sha256="", finish_reason="stop",
                          sampling=sampling or Sampling(), logprob_kind=kind,  # type: ignore[arg-type]
                          versions=(VersionSpan(version=versions[i], start=0, end=sampled),)))
        at = end + tool
    n_sampled = int((kinds == 1).sum())
    sets = np.sort(np.stack([ids[kinds == 1], np.full(n_sampled, 5, np.int32)], 1), 1).ravel() if kept else None
    branch = Branch(token_ids=ids, token_kind=kinds, logprobs=logps, calls=tuple(calls), kept_ids=sets,
                    kept_counts=np.full(n_sampled, 2, np.int32) if kept else None)
    return TrainRow(branch=branch, hint_ids=hint, episode_id=episode, train_allowed=True, hint_at=hint_at)


def full_logp(model: Any, ids: np.ndarray) -> np.ndarray:
    """Log-probs of ids[1:] by one plain forward with all logits, float32[T]; entry 0 is NaN."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float()
    logp = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]
    return np.concatenate([[np.nan], logp.numpy()]).astype(np.float32)


def sampled_by(model: Any, row: TrainRow) -> TrainRow:
    """The row with the behaviour log-probs that this model would have recorded."""
    branch = row.branch
    logp = np.where(branch.token_kind == 1, full_logp(model, branch.token_ids), np.nan).astype(np.float32)
    return replace(row, branch=branch.model_copy(update={"logprobs": logp}))


def build_heads(n: int = 6, v: int = 11, *, seed: int = 0, dtype: torch.dtype = torch.float64,
                ) -> tuple[Head, Head, LossTokens]:
    """Student (logits with gradient, identity projection), teacher, and loss tokens with weight 1/n."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.randn(n, v, generator=g, dtype=dtype)).requires_grad_(True)
    eye = torch.eye(v, dtype=dtype)
    teacher = Head(1.5 * torch.randn(n, v, generator=g, dtype=dtype), eye)
    tok = torch.randint(0, v, (n,), generator=g)
    behaviour = z.detach().log_softmax(-1).gather(1, tok[:, None])[:, 0]
    tokens = LossTokens(tok=tok, weight=torch.full((n,), 1.0 / n, dtype=dtype), turn=torch.arange(n) // 2,
                        behaviour_logp=behaviour)
    return Head(z, eye), teacher, tokens


@pytest.fixture
def make_row() -> Callable[..., TrainRow]:
    """:func:`build_row`."""
    return build_row


@pytest.fixture
def make_heads() -> Callable[..., tuple[Head, Head, LossTokens]]:
    """:func:`build_heads`."""
    return build_heads


@pytest.fixture
def record() -> Callable[[Any, TrainRow], TrainRow]:
    """:func:`sampled_by`."""
    return sampled_by


@pytest.fixture
def plain_logp() -> Callable[[Any, np.ndarray], np.ndarray]:
    """:func:`full_logp`."""
    return full_logp
