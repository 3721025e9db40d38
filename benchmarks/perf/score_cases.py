"""Log-probs of the sampled tokens of a multi-turn episode: in one forward, or turn by turn. For ``fresh.py``."""

from typing import Any

import numpy as np
import torch

from agentsdpo.benchmarks.perf.episodes import qwen, spans, train_row
from agentsdpo.benchmarks.perf.fresh import Work
from agentsdpo.learn.model import prepare_model, scores
from agentsdpo.learn.pack import packed_row
from agentsdpo.learn.records import LossTokens, sampled_logp
from agentsdpo.learn.rows import TrainRow
from agentsdpo.types import Json


def _made(shape: Json, turns: int, sampled: int, tool: int) -> tuple[Any, TrainRow]:
    row = train_row(np.random.default_rng(0), prompt=tool, turns=[(sampled, tool)] * turns, hint=1,
                    vocabulary=shape["vocabulary"], episode="e")
    return qwen(**shape), row


def episode(shape: Json, turns: int, sampled: int, tool: int) -> Work:
    """One forward of the whole branch, logits at sampled tokens alone: what the learner does."""
    model, row = _made(shape, turns, sampled, tool)
    prepare_model(model)
    at = np.concatenate([np.arange(*span) for span in spans(row)])
    ids = row.branch.token_ids[:at[-1] + 1]

    def work() -> float:
        with torch.no_grad():
            head = scores(model, packed_row([ids]), torch.from_numpy(at - 1))
            tok = torch.from_numpy(ids[at].astype(np.int64))
            zero = torch.zeros_like(tok)
            logp = sampled_logp(head, LossTokens(tok=tok, weight=zero, turn=zero, behaviour_logp=zero))
        return float(logp.sum())
    return work


def per_turn(shape: Json, turns: int, sampled: int, tool: int) -> Work:
    """One forward for each turn: its whole history and its tokens, logits at its tokens alone, no padding."""
    model, row = _made(shape, turns, sampled, tool)

    def work() -> float:
        total = 0.0
        with torch.no_grad():
            for start, end in spans(row):
                ids = torch.from_numpy(row.branch.token_ids[None, :end].astype(np.int64))
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=end - start + 1).logits[0, :-1]
                total += float(logits.log_softmax(-1).gather(1, ids[0, start:end, None]).sum())
        return total
    return work
