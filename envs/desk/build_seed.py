"""Build the seed model from nothing: tokenizer, then weights, on CPU, with fixed seeds.

    python -m agentsdpo.envs.desk.build_seed --out DIR [--threads 2] [--tokenizer-only]

Writes ``model.safetensors``, ``config.json``, tokenizer and chat template, and ``training.json`` with the corpus hash
and the loss of each stage beside its computable floor: an un-hinted episode must guess, so no model can get below
(unstated slots x ln 4) / (agent tokens). ``python -m agentsdpo.benchmarks.seed_gates --model DIR`` judges the result.
"""

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agentsdpo.chat import ChatFormat
from agentsdpo.envs.desk import corpus, text
from agentsdpo.envs.desk.firm import SLOTS, hint
from agentsdpo.envs.desk.seed import seed_path

VOCAB = 1024
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>",
         '\n{"name": "', '", "arguments": {"', '"}}\n', '": "', '", "')
"""Added tokens that are text: the tags of the Hermes form and five pieces of JSON scaffolding."""

_SPLIT = r" ?[A-Za-z_]+|\d|[^A-Za-z_\d]+"
_POOL = 1024
SEED = 20_26


def build_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the world's own text; every name of the whole product stands in the corpus equally often."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([  # type: ignore[assignment]
        pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    bpe.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(PLAIN), special_tokens=list(SPECIAL), show_progress=False,
                                  min_frequency=_NAME_COUNT + 1,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(_tokenizer_text(), trainer)
    bpe.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (Path(__file__).parent / "assets" / "chat_template.jinja").read_text()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    return tokenizer


def _tokenizer_text() -> Iterator[str]:
    """Words of the world and all names; the added tokens cut the text, as they will at use."""
    for item in islice(corpus.traces(_PlainFrame(), SEED), 1000):  # type: ignore[arg-type]
        pieces = [_WORD.sub(lambda m: "" if m.group() in _NAMES else m.group(), item.text)]
        for token in (*SPECIAL, *PLAIN):
            pieces = [part for piece in pieces for part in piece.split(token)]
        yield from filter(None, pieces)
    for name in text.all_names():
        yield from [f"@{name}"] * _NAME_COUNT
    for slot, options in SLOTS.items():
        yield from (hint("tax", {slot: option}) for option in options * (_NAME_COUNT + 1))


_NAMES, _WORD = frozenset(text.all_names()), re.compile("[a-z]{6}")
_NAME_COUNT = 20
"""Names stand in the corpus this often each and nowhere else, and a merge must be seen more often than that: so
syllables and pairs of syllables become tokens, and no single name does."""


class _PlainFrame:
    """The template's text before a tokenizer exists."""

    head = "<|im_start|>system\n" + text.SYSTEM + "\nTools:" + "".join(
        f" {t.name}" for t in corpus.TOOLS) + "<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    before, after = "\n<|im_start|>user\n<tool_response>\n", "\n</tool_response>" + tail
    hint_before, hint_after = "<|im_start|>system\n", "<|im_end|>\n"
    end = "<|im_end|>"


def seed_config() -> Qwen3Config:
    """1.52 M parameters; head_dim differs from hidden/heads, as in real Qwen3 models."""
    return Qwen3Config(vocab_size=VOCAB, hidden_size=160, intermediate_size=448, num_hidden_layers=4,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
                       tie_word_embeddings=True, bos_token_id=None, eos_token_id=2, pad_token_id=0,
                       attention_dropout=0.0, dtype="float32")


@dataclass(frozen=True)
class Stage:
    """Optimiser steps with one shape of learning rate, up to ``peak`` of the common one: warm up and hold, or fall to
    zero."""

    steps: int
    decay: bool
    peak: float = 1.0

    def factor(self, step: int, seen: int) -> float:
        """Learning-rate factor in [0, 1] after ``step`` steps and ``seen`` tokens."""
        return self.peak * (1.0 - step / self.steps if self.decay else min(1.0, seen / WARM_UP_TOKENS))


Stages = Sequence[tuple[Stage, Callable[[ChatFormat, int], Iterator[corpus.Trace]]]]
"""Each with what it reads, of a seed."""
LEARNING_RATE, WARM_UP_TOKENS, BATCH_TOKENS = 2e-3, 320_000, 4096
STAGES = (Stage(2000, decay=False), Stage(1300, decay=True))
"""Each reads its own of :data:`corpus.MIXES`."""


class Batches:
    """Batches of about ``tokens`` tokens, of near equal length, from a seeded stream; hashes what it read."""

    def __init__(self, tokenizer: Any, stream: Iterator[corpus.Trace], tokens: int, seed: int) -> None:
        self.stream, self.tokenizer, self.tokens, self.rng = stream, tokenizer, tokens, random.Random(seed)
        self.hash = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
        """Ids int64[B,T] (right-padded with 0), loss mask bool[B,T], loss floor in nats summed over the batch."""
        while True:
            items = list(islice(self.stream, _POOL))
            rows = corpus.encode(self.tokenizer, items)
            for ids, _ in rows:
                self.hash.update(ids.tobytes())
            order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
            groups: list[list[int]] = [[]]
            for i in order:
                if (len(groups[-1]) + 1) * len(rows[i][0]) > self.tokens and groups[-1]:
                    groups.append([])
                groups[-1].append(i)
            self.rng.shuffle(groups)
            for group in groups:
                floor = sum(items[i].unstated for i in group) * math.log(4)
                yield (*collate([rows[i] for i in group]), floor)


def collate(rows: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and masks; causal attention keeps padding out of every real token."""
    length = max(len(ids) for ids, _ in rows)
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, (row, keep) in enumerate(rows):
        ids[i, :len(row)], mask[i, :len(row)] = torch.from_numpy(row.astype(np.int64)), torch.from_numpy(keep)
    return ids, mask


def nll(model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every masked token, float32[N]; the head runs on those positions alone."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[mask[:, 1:]]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask[:, 1:]], reduction="none")


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by a quintic Newton-Schulz iteration (Jordan 2024), scaled to AdamW's update size.

    torch has one, which iterates in bfloat16: on CPUs without bfloat16 units that took longer than the model itself.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """The nearest matrix with singular values near one."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def optimisers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [Muon(matrices, lr=LEARNING_RATE),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def train(tokenizer: Any, out: Path, batch_tokens: int, stages: Sequence[Stage] = STAGES, first: int = 0) -> None:
    """Train stage by stage; save weights, and the figures of each stage in ``training.json``.

    Args:
        tokenizer: of :func:`build_tokenizer`.
        out: folder for the weights, written at the end of each stage and every 200 steps.
        batch_tokens: tokens of one optimiser step, padding included.
        stages: what to do.
        first: stages already done; the weights are then taken from ``out``.
    """
    torch.manual_seed(SEED)
    model = Qwen3ForCausalLM.from_pretrained(out) if first else Qwen3ForCausalLM(seed_config())
    mixes = [partial(_mixed, mix=mix) for mix in corpus.MIXES]
    read_stages(model, tokenizer, list(zip(stages, mixes, strict=False)), out, SEED, batch_tokens, first)


def _mixed(chat: ChatFormat, seed: int, mix: corpus.Mix) -> Iterator[corpus.Trace]:
    return corpus.traces(corpus.Frame(chat), seed, mix)


def read_stages(model: Qwen3ForCausalLM, tokenizer: Any, stages: Stages, out: Path, seed: int,
                batch_tokens: int = BATCH_TOKENS, first: int = 0) -> None:
    """Read stage after stage from ``first`` on; weights and the figures of each go to ``out``."""
    chat, log = ChatFormat(tokenizer), out / "training.json"
    figures: list[dict[str, Any]] = json.loads(log.read_text())[:first] if first and log.exists() else []
    for number, (stage, stream) in list(enumerate(stages))[first:]:
        batches = Batches(tokenizer, stream(chat, seed + number), batch_tokens, seed + number)
        figures.append(train_stage(model, stage, batches, out))
        log.write_text(json.dumps(figures, indent=2) + "\n")


def teach(about: str | None, stages: Stages, seed: int, out: Path) -> None:
    """Command line of a script that teaches the shipped model more; ``about`` is its docstring. Weights in float16."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=out, help=f"folder; {out}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first-stage", type=int, default=0, help="go on in --out from this stage (1: the second)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(seed_path())
    tokenizer.save_pretrained(args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out if args.first_stage else seed_path(), dtype=torch.float32)
    read_stages(model, tokenizer, stages, args.out, seed, first=args.first_stage)
    model.half().save_pretrained(args.out)  # as it is shipped and measured: half the bytes


def train_stage(model: Qwen3ForCausalLM, stage: Stage, batches: Batches, out: Path) -> dict[str, Any]:
    """One stage with fresh optimisers; weights go to ``out``, its figures are returned."""
    opts, seen, started, recent = optimisers(model), 0, time.time(), []
    for step, (ids, mask, floor) in enumerate(islice(batches, stage.steps), 1):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = LEARNING_RATE * stage.factor(step - 1, seen)
        losses = nll(model, ids, mask)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += ids.numel()
        recent = [*recent[-49:], (float(losses.detach().sum()), floor, len(losses), len(ids))]
        if step % 25 == 0:
            print(line(step, stage.steps, seen, started, recent[-25:]), flush=True)  # noqa: T201 - a script's talk
        if step % 200 == 0 or step == stage.steps:
            model.save_pretrained(out)
    total, low, count, episodes = (sum(r[i] for r in recent) for i in range(4))
    return {"tokens": seen, "steps": stage.steps, "loss": total / count, "floor": low / count,
            "excess_nats_per_episode": (total - low) / episodes, "corpus_sha256": batches.hash.hexdigest(),
            "wall_s": time.time() - started}


def line(step: int, steps: int, seen: int, started: float, recent: list[tuple[float, float, int, int]]) -> str:
    """One line of progress; ``recent`` holds (loss, floor, tokens, episodes) sums of the last batches."""
    total, low, count, episodes = (sum(r[i] for r in recent) for i in range(4))
    took = time.time() - started
    return (f"step {step} of {steps}  {seen / 1e6:.2f} M tokens  {seen / took:.0f} tok/s  "
            f"left {took * (steps / step - 1) / 60:.0f} min  loss {total / count:.4f} floor {low / count:.4f}  "
            f"excess {(total - low) / episodes:.3f} nats/episode")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer-only", action="store_true")
    parser.add_argument("--first-stage", type=int, default=0, help="go on in --out from this stage (1: the decay)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer(args.out)
    if not args.tokenizer_only:
        train(tokenizer, args.out, args.batch_tokens, first=args.first_stage)


if __name__ == "__main__":
    main()
