"""Models and episodes that learner benchmarks are made of: shapes of Qwen3, random weights, random tokens."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from agentsdpo.learn.rows import TrainRow
from agentsdpo.types import Branch, Call, Sampling, VersionSpan

FIRST = 20
"""Smallest id drawn; those below are kept free for padding and ends of turns."""


def qwen(*, vocabulary: int, width: int, layers: int, mlp: int, heads: int = 4, groups: int = 2, head: int = 64,
         window: int = 1 << 20, dtype: str = "float32", device: str = "cpu") -> Any:
    """A causal language model of Qwen3's architecture with tied embedding and head, weights from a fixed seed.

    Logits have a variance of about 1, so that what a hint changes is more than rounding.

    Args:
        vocabulary: ids.
        width: of the hidden states.
        layers: decoder layers.
        mlp: width inside an MLP.
        heads: query heads.
        groups: key and value heads.
        head: width of a head.
        window: longest row, tokens.
        dtype: of the weights.
        device: where they are made.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.initialization import no_init_weights

    shape = Qwen3Config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, intermediate_size=mlp,
                        num_attention_heads=heads, num_key_value_heads=groups, head_dim=head,
                        max_position_embeddings=window, tie_word_embeddings=True, dtype=dtype)
    with torch.device(device), no_init_weights():
        model = Qwen3ForCausalLM(shape).to(getattr(torch, dtype))
    model.tie_weights()
    g = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(std=width**-0.5, generator=g)
    return model.eval()


def train_row(rng: np.random.Generator, *, prompt: int, turns: Sequence[tuple[int, int]], hint: int, vocabulary: int,
              episode: str) -> TrainRow:
    """One episode: a prompt, then ``(sampled, tool)`` tokens turn by turn, and a hint only the teacher reads."""
    n = prompt + sum(map(sum, turns))
    ids = rng.integers(FIRST, vocabulary, n).astype(np.int32)
    kinds, logps = np.zeros(n, np.uint8), np.full(n, np.nan, np.float32)
    calls, at = [], prompt
    for i, (sampled, tool) in enumerate(turns):
        end = at + sampled
        kinds[at:end], kinds[end:end + tool], logps[at:end] = 1, 2, -np.log(vocabulary)
        calls.append(Call(call_id=f"{episode}-{i}", turn=i, start=at, end=end, prompt_sha256="", finish_reason="stop",
                          sampling=Sampling(), logprob_kind="processed",
                          versions=(VersionSpan(version=0, start=0, end=sampled),)))
        at = end + tool
    branch = Branch(token_ids=ids, token_kind=kinds, logprobs=logps, calls=tuple(calls))
    return TrainRow(branch=branch, hint_ids=tuple(map(int, rng.integers(FIRST, vocabulary, hint))), episode_id=episode,
                    train_allowed=True)


def ragged(seed: int, turns: Sequence[int], *, vocabulary: int, sampled: int, tool: int, prompt: int,
           hint: int) -> list[TrainRow]:
    """Episodes of so many turns each, their lengths log-normal around the given medians (sigma 0.8, as agents' are)."""
    rng = np.random.default_rng(seed)

    def length(median: int) -> int:
        return int(np.clip(round(median * rng.lognormal(0.0, 0.8)), 2, 8 * median))
    return [train_row(rng, prompt=length(prompt), turns=[(length(sampled), length(tool)) for _ in range(n)], hint=hint,
                      vocabulary=vocabulary, episode=f"e{i}") for i, n in enumerate(turns)]


def spans(row: TrainRow) -> Iterator[tuple[int, int]]:
    """Start and end of each turn's sampled tokens."""
    for call in row.branch.calls:
        yield call.start, call.end
