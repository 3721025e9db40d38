"""One optimiser step on ragged multi-turn episodes: ours, and TRL's SDPOTrainer fed with the same. For ``fresh.py``.

Both train the same adapter (rank 16 on every linear layer of the body) with the same teacher (the base weights, hint
in front) and the same objective: generalised JSD over the whole vocabulary, every turn weighing the same. TRL's
trainer knows one completion per prompt, so each turn is a row of its own: everything before it is its prompt, padded
to the longest of its micro-batch on both sides. Nothing is generated; the batch is handed to ``compute_loss``.
"""

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agentsdpo.benchmarks.perf.episodes import qwen, ragged, spans, train_row
from agentsdpo.benchmarks.perf.fresh import Work
from agentsdpo.learn.adapters import add_adapter
from agentsdpo.learn.config import AdapterConfig, LearnConfig
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.rows import TrainRow
from agentsdpo.types import Json

BETA, LR, RANK, PAD = 0.5, 1e-5, 16, 0


def _config(**fields: Any) -> LearnConfig:
    return LearnConfig(beta=BETA, jsd_scale="raw", normaliser="turn", teacher="frozen", lr=LR, control_every=0,
                       adapter=AdapterConfig(rank=RANK), **fields)


def ours(shape: Json, episodes: Json, support: str, top_k: int, forward_tokens: int) -> Work:
    """A whole step of the learner: admission, packing, both forwards, loss, backward, AdamW, diagnostics."""
    rows = ragged(vocabulary=shape["vocabulary"], **episodes)
    learner = Learner(qwen(**shape), _config(support=support, top_k=top_k, forward_tokens=forward_tokens))
    return lambda: learner.step(rows, version=0).metrics["learn/loss"]


def trl(shape: Json, episodes: Json, support: str, top_k: int, batch: int) -> Work:
    """Loss and backward of SDPOTrainer on micro-batches of ``batch`` rows, then clipping and AdamW."""
    rows = ragged(vocabulary=shape["vocabulary"], **episodes)
    trainer = _trainer(qwen(**shape), support, top_k, batch)
    model = trainer.model
    model.train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=LR, weight_decay=0.0)
    batches = list(_padded(rows, batch))
    turns = sum(len(inputs["prompt_ids"]) for inputs in batches)

    def work() -> float:
        total = 0.0
        trainer.current_gradient_accumulation_steps = 1
        for inputs in batches:  # a mean over its rows, so that it counts by their number
            loss = trainer.compute_loss(model, inputs) * (len(inputs["prompt_ids"]) / turns)
            trainer.accelerator.backward(loss)
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total
    return work


def _trainer(model: Any, support: str, top_k: int, batch: int) -> Any:
    """The trainer as a user sets it up, but for what generation would need."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.load import load_chat

    mode: dict[str, Any] = {"distillation_mode": "full_logits"} if support == "full" else {
        "distillation_mode": "topk_logits", "distillation_topk": top_k, "distillation_add_tail": True}
    args = SDPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none",
                      per_device_train_batch_size=batch, num_generations=1, generation_batch_size=batch,
                      distillation_alpha=BETA, teacher_model_kind="base", gradient_checkpointing=False,
                      learning_rate=LR, disable_dropout=True, **mode)
    return SDPOTrainer(model=model, reward_funcs=_unscored, args=args,
                       train_dataset=Dataset.from_list([{"prompt": "."}] * batch),
                       processing_class=load_chat(seed_path()).tokenizer,
                       peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0,
                                              task_type="CAUSAL_LM"))


def _unscored(completions: list[Any], **_: Any) -> list[float]:
    """Rewards, which distillation alone does not read."""
    return [0.0] * len(completions)


def _padded(rows: Sequence[TrainRow], batch: int) -> Iterator[dict[str, Tensor]]:
    """Turns in random order, ``batch`` of them at a time, as the trainer's sampler and ``pad`` make them."""
    from trl.trainer.utils import pad

    singles = [(row, *span) for row in rows for span in spans(row)]
    order = torch.randperm(len(singles), generator=torch.Generator().manual_seed(0)).tolist()
    for at in range(0, len(singles), batch):
        picked = [singles[i] for i in order[at:at + batch]]
        prompts = [_ids(row, 0, start) for row, start, _ in picked]
        hinted = [torch.cat([torch.tensor(row.hint_ids), _ids(row, 0, start)]) for row, start, _ in picked]
        answers = [_ids(row, start, end) for row, start, end in picked]
        (prompt, prompt_mask), (teacher, teacher_mask) = (
            (pad(side, PAD, "left"), pad([torch.ones_like(one) for one in side], 0, "left"))
            for side in (prompts, hinted))
        answer, mask = pad(answers, PAD, "right"), pad([torch.ones_like(one) for one in answers], 0, "right")
        yield {"prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": answer, "completion_mask": mask,
               "teacher_input_ids": torch.cat([teacher, answer], 1),
               "teacher_attention_mask": torch.cat([teacher_mask, mask], 1),
               "self_distillation_mask": torch.ones(len(picked))}


def _ids(row: TrainRow, start: int, end: int) -> Tensor:
    return torch.from_numpy(row.branch.token_ids[start:end]).long()


def tokens(shape: Json, episodes: Json) -> Json:
    """What the episodes hold: loss tokens, tokens, turns; padded tokens are those of TRL's rows."""
    rows = ragged(vocabulary=shape["vocabulary"], **episodes)
    each = [(end - start, end) for row in rows for start, end in spans(row)]
    return {"episodes": len(rows), "turns": len(each), "loss_tokens": sum(n for n, _ in each),
            "tokens": sum(max(end for _, end in spans(row)) for row in rows), "tokens_by_turn": sum(n for _, n in each)}


def long_dense(shape: Json, context: int, share: float) -> Work:
    """The same loss on logits of all loss tokens at once, as TRL computes it, nothing recomputed: one long row.

    Generous to it: no padding, and no logits where there is no loss.
    """
    from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss

    row = _long(shape, context, share)
    model = qwen(**shape)
    add_adapter(model, AdapterConfig(rank=RANK))
    at = torch.cat([torch.arange(*span) for span in spans(row)])
    hint = torch.tensor(row.hint_ids)
    ids = _ids(row, 0, int(at[-1]) + 1)

    def logits(row_ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=row_ids[None], use_cache=False, logits_to_keep=positions).logits[0].float()

    def work() -> float:
        student = logits(ids, at - 1)
        model.disable_adapters()
        with torch.no_grad():
            teacher = logits(torch.cat([hint, ids]), at - 1 + len(hint))
        model.enable_adapters()
        loss = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=BETA).mean()
        loss.backward()
        return float(loss.detach())
    return work


def long_ours(shape: Json, context: int, share: float, forward_tokens: int) -> Work:
    """A step on one long episode, with everything that saves memory: recomputation, tiled MLP, adapter."""
    rows = [_long(shape, context, share)]
    learner = Learner(qwen(**shape), _config(support="full", forward_tokens=forward_tokens, recompute="layers",
                                             mlp_tokens=1024))
    return lambda: learner.step(rows, version=0).metrics["learn/loss"]


def _long(shape: Json, context: int, share: float) -> TrainRow:
    turn, turns = 256, context // 256
    sampled = round(turn * share)
    return train_row(np.random.default_rng(0), prompt=turn - sampled, turns=[(sampled, turn - sampled)] * turns,
                     hint=64, vocabulary=shape["vocabulary"], episode="e")
