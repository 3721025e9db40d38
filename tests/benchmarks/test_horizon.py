"""The horizon study: its training text is what a collector records, and its lines say what its rows say."""

import asyncio
import hashlib
import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentsdpo.benchmarks.horizon import __main__ as horizon
from agentsdpo.benchmarks.horizon import gates
from agentsdpo.benchmarks.horizon.corpus import cut_trace, cut_traces, drill
from agentsdpo.benchmarks.horizon.study import ARMS, COMMON, CONFIG, MODEL
from agentsdpo.benchmarks.study import COLUMNS
from agentsdpo.calls import write_call
from agentsdpo.chat import ChatFormat
from agentsdpo.collect.compaction import compactor
from agentsdpo.collect.policy import EnginePolicy
from agentsdpo.collect.rollout import run_episode
from agentsdpo.envs.desk import DeskEnv, DeskSuite
from agentsdpo.envs.desk.agents import ScriptedAgent, guess
from agentsdpo.envs.desk.corpus import Frame
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.learn.load import load_chat
from agentsdpo.learn.presets import TOY, resolve
from agentsdpo.types import Completion, Sampling, Task, ToolCall, VersionSpan


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return load_chat(seed_path())


def calls(task: Task, rules: dict[str, str]) -> list[ToolCall]:
    """What an agent that takes notes does by these rules, from its first call to its last."""
    agent, env, done, answer = ScriptedAgent(task, rules, notes=True), DeskEnv(), list[ToolCall](), None
    env.start(task)
    while not env.done():
        name, arguments = agent.step(answer)
        done.append(ToolCall(id="c", name=name, arguments=arguments))
        answer = env.apply(done[-1]).content
    return done


def said_of(call: ToolCall, chat: ChatFormat) -> str:
    """A call as the model writes it."""
    assert isinstance(call.arguments, dict)
    return write_call(call.name, call.arguments) + chat.tokenizer.eos_token


class Reciter:
    """An engine that says one prepared turn after the other."""

    name, records_kept, version, context_window = "reciter", False, 0, CONFIG.window

    def __init__(self, chat: ChatFormat, said: list[str]) -> None:
        self.chat, self.left = chat, list(said)
        self.vocab_size, self.eos_ids = chat.vocab_size, (chat.eos_id,)

    async def complete(self, prompt_ids: Any, sampling: Sampling, *, session: str) -> Completion:
        ids = self.chat.encode(self.left.pop(0))
        return Completion(token_ids=tuple(ids), logprobs=(-0.5,) * len(ids), finish_reason="stop",
                          versions=(VersionSpan(version=0, start=0, end=len(ids)),))

    def release(self, session: str) -> None:
        """Nothing is kept."""


@pytest.mark.parametrize("n", [2, 16, 48])
def test_the_text_is_what_a_collector_records_of_the_same_episode(chat: ChatFormat, n: int) -> None:
    task = DeskSuite(n=(n,)).task("train", 3)
    branches = cut_trace(chat, Frame(chat), task, random.Random(5), stated=[])
    rules = guess("desk-mini", random.Random(5))
    said = [said_of(call, chat) for call in calls(task, rules)]
    policy = EnginePolicy(Reciter(chat, said), chat, CONFIG)
    run = asyncio.run(run_episode(DeskEnv(), policy, task, seed=0, episode_id="e",
                                  compaction=compactor(CONFIG.compaction)))
    recorded = [chat.decode(branch.token_ids.tolist()) for branch in run.branches]
    assert [branch.text for branch in branches] == recorded
    assert sum(len(branch.spans) for branch in branches) == len(said), "a turn carries loss once"
    assert (len(branches) > 2) == (n > 2)
    assert max(len(chat.encode(piece)) for piece in said) <= CONFIG.max_tokens


def test_the_stream_is_seeded_and_marks_what_the_agent_wrote(chat: ChatFormat) -> None:
    one, other = (list(islice(cut_traces(chat, 7), 12)) for _ in range(2))
    assert one == other
    assert one != list(islice(cut_traces(chat, 8), 12))
    for trace in one:
        assert all(trace.text[start:end].endswith(chat.tokenizer.eos_token) for start, end in trace.spans)
        assert all(trace.text[start:end].startswith("<tool_call>") for start, end in trace.spans)


def test_a_drill_goes_on_where_the_notes_end(chat: ChatFormat) -> None:
    task, asked = DeskSuite(n=(16,)).task("train", 3), set[str]()
    for seed in range(12):
        trace = drill(chat, Frame(chat), task, random.Random(seed))
        said = "".join(trace.text[start:end] for start, end in trace.spans)
        left = re.findall("[a-z]{6}", "".join(re.findall(r'"(?:text|path)": "(?:[a-z]+/)?([a-z ]+)"', said)))
        noted = re.findall(r"(?m)^([a-z]{6}) \d+$", trace.text)
        assert left
        assert noted + left == task.metadata["clients"][:len(noted + left)]
        asked.add(trace.text.partition("<|im_start|>user\n")[2].split()[0])
    assert asked == {"Read", "List"}


def row(seed: int, step: int, rate: float, *, split: str = "test_names", decoding: str = "sampled") -> dict[str, Any]:
    return {"study": "horizon", "arm": "robust-n8", "preset": "robust", "staleness": 16, "seed": seed, "step": step,
            "episodes": 16 * step, "env_steps": 480 * step, "wall_s": 1.0, "split": split, "decoding": decoding,
            "n": 64, "pass": rate, "score": (1 + rate) / 2, "commit": "", "hardware": ""}


def test_what_its_line_says() -> None:
    rows = [row(seed, step, rate, split=split, decoding=decoding) for seed in (0, 1)
            for step, rate in ((0, 0.0), (60, 0.9)) for decoding in ("sampled", "greedy")
            for split in ("test_names", "test_world", "test_period")]
    rows += [row(seed, 60, 0.01, split="test_firm") for seed in (0, 1)]
    assert list(horizon.lines(pa.Table.from_pylist(rows, COLUMNS))) == [
        "robust-n8   2 seeds  960 episodes of 30 calls  pass 0.0 % [0.0, 0.0] -> 90.0 % [90.0, 90.0], greedy 90.0 %, "
        "score 50.0 % [50.0, 50.0] -> 95.0 % [95.0, 95.0], untaught firm 1.0 %"]


def test_its_model_learns_at_the_rate_of_a_small_one_and_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert all(arm.config(COMMON, 0).learn.lr == resolve("robust", TOY["robust"]).lr for arm in ARMS.values())
    with pytest.raises(SystemExit):
        horizon.main(["--quick", "--model", "nowhere"])
    assert "there is no model at nowhere: python -m agentsdpo.benchmarks.horizon.build" in capsys.readouterr().err


def test_its_model_does_what_it_is_told_and_guesses_when_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    gates.main(["--tasks", "12", "--lengths", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    (row,) = found["rows"]
    assert found["model_sha256"] == hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert (row["n"], row["episodes"], row["unhinted_pass"]) == (4, 12, 0.0)
    assert row["hinted_pass"] >= 0.5
    assert row["hinted_score"] > row["unhinted_score"] + 0.2


@pytest.mark.slow
def test_a_quick_study_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    horizon.main(["--quick", "--arms", "robust-n4", "--model", str(seed_path()), "--out", str(tmp_path)])
    assert "robust-n4   1 seed  8 episodes of" in capsys.readouterr().out
    found = pq.read_table(tmp_path / "results.parquet")
    assert set(found["step"].to_pylist()) == {0, 1, 2}
