"""Log-probs of given ids under given weights, one row at a time: what a served policy is held against.

By the model's own forward, without packing, segments or chunks, so that what it judges shares none of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentsdpo.learn.load import load_chat, load_model, take_weights

_TEXT = ("You work at a desk. Read the task, call one tool at a time, look at what it answers, and file a figure only "
         "when you have seen where it comes from. Amounts are in cents; 1,204.50 and 1204.5 are the same amount. "
         "When two sheets disagree, the later one counts, unless a mail says otherwise. ")


class ModelScorer:
    """A causal language model whose weights are replaced at will, in float32 on the CPU.

    Args:
        path: model folder or hub name: architecture and tokenizer; its weights count until :meth:`load`.
        prompt_tokens: length of :attr:`prompt`, less where the model's positions end before.

    Raises:
        ModelError, TokenizerMismatch: see :mod:`agentsdpo.learn.load`.
    """

    def __init__(self, path: Path | str, *, prompt_tokens: int = 300) -> None:
        chat = load_chat(path)
        self._model: Any = load_model(path, chat)
        ids = chat.encode(_TEXT)
        window = getattr(self._model.config.get_text_config(), "max_position_embeddings", None) or prompt_tokens + 64
        self.prompt = (ids * (prompt_tokens // len(ids) + 1))[:min(prompt_tokens, window - 64)]
        """Ids of a text as agents read it, int[P]."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights; raises as :func:`~agentsdpo.learn.load.take_weights` does."""
        take_weights(self._model, weights)

    @torch.no_grad()
    def logps(self, ids: Sequence[int], n: int) -> list[float]:
        """Log-probs of the last ``n`` ids, each after all before it, nats; ``n`` below their number."""
        row = torch.tensor([list(ids)])
        logits = self._model(input_ids=row, use_cache=False, logits_to_keep=n + 1).logits[0, :-1]
        return torch.log_softmax(logits.float(), -1).gather(1, row[0, -n:, None])[:, 0].tolist()
