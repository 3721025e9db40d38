"""Does the shipped seed model keep its promises? It must follow hints, and know no house rule.

    python -m agentsdpo.benchmarks.seed_gates [--model DIR] [--tasks 200] [--json]

Every task has rules of its own (a firm seeded by the task), so nothing can be known beforehand. Prints one line per
gate; exit code 1 when one is missed.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch

from agentsdpo.assemble import inprocess_engine
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.collect.policy import EnginePolicy, Policy
from agentsdpo.envs.desk import DeskGrader, DeskSuite, Firm
from agentsdpo.envs.desk.corpus import Frame, encode, trace
from agentsdpo.envs.desk.firm import MINI_SLOTS, SLOTS, hint
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.hint.render import HintedChat
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.types import Episode, Grade, Hint, Outcome, Task

CONFIG = CollectConfig(window=1536, concurrency=50, max_tokens=64)


class ForeignFirms(DeskSuite):
    """Every task belongs to a firm of its own."""

    def grader(self) -> Any:
        """Grades each task by its own firm."""
        return self

    async def grade(self, task: Task, outcome: Outcome) -> Grade:
        """One task by its own firm."""
        return DeskGrader(Firm(task.seed)).judge(task, outcome)

    def told(self, task: Task) -> Hint:
        """The rules of the task's firm in words."""
        kind = task.metadata["kinds"][0]
        return Hint(text=hint(kind, Firm(task.seed).rules(kind, self.preset)), source="criteria", author=self.name)


def play(engine: InProcessEngine, chat: ChatFormat, *, n: int, split: str, hinted: bool, greedy: bool, tasks: int,
         config: CollectConfig = CONFIG) -> list[Episode]:
    """Free runs of the model, with or without the hint."""
    suite = ForeignFirms(n=(n,))
    config = config.model_copy(update={"temperature": 0.0 if greedy else 1.0})

    def policy(task: Task, seed: int) -> Policy:
        reads = HintedChat(chat, suite.told(task)) if hinted else chat
        return EnginePolicy(engine, reads, config, training=False)

    return Collector(suite, policy, config, evaluate=True).collect(split, range(tasks), seed=1)


def passed(episodes: list[Episode]) -> float:
    """Share of episodes that passed."""
    return sum(bool(e.grade and e.grade.passed) for e in episodes) / len(episodes)


def invalid(episodes: list[Episode]) -> float:
    """Share of calls that could not be executed as written."""
    calls = sum(e.metadata["calls"] for e in episodes)
    return 1 - sum(e.metadata["valid_calls"] for e in episodes) / max(calls, 1)


def slot_entropy(model: Any, chat: ChatFormat, tasks: int = 64) -> float:
    """Mean entropy (nats) of an un-hinted model where it must choose an option of a house rule."""
    suite, rng, frame = DeskSuite(), random.Random(3), Frame(chat)
    options = {token for slot in MINI_SLOTS for option in SLOTS[slot] for token in chat.encode(option)[:1]}
    opener, found = chat.encode('": "')[0], []
    for ids, mask in encode(chat.tokenizer, [trace(frame, suite.task("val", i), rng, stated=[]) for i in range(tasks)]):
        with torch.no_grad():
            logp = model(input_ids=torch.from_numpy(ids.astype("int64"))[None]).logits[0].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        found += [float(entropy[t - 1]) for t in range(1, len(ids))
                  if mask[t] and int(ids[t]) in options and ids[t - 1] == opener]
    return sum(found) / len(found)


def gates(path: Path, tasks: int) -> list[dict[str, Any]]:
    """All gates as rows: name, value, limit, whether it is kept."""
    chat = load_chat(path)
    model = load_model(path, chat)
    engine = inprocess_engine(CONFIG, path, chat)
    rows: list[dict[str, Any]] = []

    def gate(name: str, value: float, limit: float, *, least: bool) -> None:
        kept = value >= limit if least else value <= limit
        rows.append({"name": name, "value": round(value, 4), "limit": limit, "least": least, "kept": kept})

    for split in ("val", "test_names"):
        sampled = play(engine, chat, n=1, split=split, hinted=True, greedy=False, tasks=tasks)
        best = play(engine, chat, n=1, split=split, hinted=True, greedy=True, tasks=tasks)
        four = play(engine, chat, n=4, split=split, hinted=True, greedy=True, tasks=tasks // 2)
        blind = play(engine, chat, n=1, split=split, hinted=False, greedy=False, tasks=tasks)
        gate(f"{split}/hinted_sampled_n1", passed(sampled), 0.95, least=True)
        gate(f"{split}/hinted_greedy_n1", passed(best), 0.99, least=True)
        gate(f"{split}/hinted_greedy_n4", passed(four), 0.90, least=True)
        gate(f"{split}/unhinted_sampled_n1", passed(blind), 0.02, least=False)
        gate(f"{split}/invalid_calls", invalid([*sampled, *best, *blind]), 0.01, least=False)
    gate("slot_entropy_over_ln4", slot_entropy(model, chat) / math.log(4), 0.9, least=True)
    gate("file_mb", (path / "model.safetensors").stat().st_size / 1e6, 8.0, least=False)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="folder; the shipped model when not given")
    parser.add_argument("--tasks", type=int, default=200, help="per split and decoding")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = gates(args.model or seed_path(), args.tasks)
    if args.json:
        sys.stdout.write(json.dumps(rows) + "\n")
    else:
        for row in rows:
            sign = ">=" if row["least"] else "<="
            sys.stdout.write(f"{'kept' if row['kept'] else 'MISSED':6}  {row['name']:32} {row['value']:8.4f}  "
                             f"{sign} {row['limit']}\n")
    sys.exit(0 if all(row["kept"] for row in rows) else 1)


if __name__ == "__main__":
    main()
