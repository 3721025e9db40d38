"""Against a real vLLM with the seed model, on loopback: recorded, learnt from, published to, recorded again."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.vllm import VllmEngine
from agentsdpo.config import RunConfig
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import EngineError
from agentsdpo.learn.learner import Learner
from agentsdpo.learn.load import load_model
from agentsdpo.learn.rows import TrainRow
from agentsdpo.learn.scoring import ModelScorer
from agentsdpo.publish.push import BOUND
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publishing import make_pusher
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Episode, Sampling

pytestmark = pytest.mark.vllm


def engine_of(server: Any, chat: Any) -> VllmEngine:
    return VllmEngine(server.url, eos_ids=(chat.eos_id,), vocab_size=1024)


def collect(server: Any, chat: Any, indices: Sequence[int]) -> list[Episode]:
    config = CollectConfig(concurrency=8, max_turns=4, max_tokens=48)
    collector = Collector.of_engine(DeskSuite("desk-mini"), engine_of(server, chat), chat, config, model_id="seed")
    return collector.collect("train", indices)


def parity(scorer: ModelScorer, episodes: Sequence[Episode]) -> float:
    """Mean absolute difference of recorded and recomputed log-probs, nats."""
    off = [abs(own - told) for episode in episodes for branch in episode.branches for call in branch.calls
           for own, told in zip(scorer.logps(branch.token_ids[:call.end].tolist(), call.end - call.start),
                                branch.logprobs[call.start:call.end].tolist(), strict=True)]
    return float(np.mean(off))


def rows_of(chat: Any, episodes: Sequence[Episode]) -> list[TrainRow]:
    hint = tuple(chat.hint("For tax work: unit k_usd."))
    return [TrainRow(branch=branch, hint_ids=hint, episode_id=episode.episode_id, train_allowed=True,
                     tokenizer_sha256=episode.tokenizer_sha256, chat_template_sha256=episode.chat_template_sha256,
                     score=episode.reward, group=episode.group_id, source="criteria")
            for episode in episodes for branch in episode.branches]


def test_the_server_is_what_it_was_started_as(vllm_server: Any, chat: Any) -> None:
    engine = engine_of(vllm_server, chat)
    assert engine.facts.route == "/inference/v1/generate"
    assert engine.facts.kind == "processed"
    assert (engine.version, engine.context_window, engine.model) == (0, 4096, "policy")
    with pytest.raises(EngineError, match="vocabulary"):
        asyncio.run(engine.complete([5, 6000], Sampling(), session="e/0"))
    done = asyncio.run(engine.complete([5, 6, 7], Sampling(max_tokens=5, temperature=0.6), session="e/0"))
    assert len(done.token_ids) <= 5
    assert done.logprob_kind == "processed"


def test_collect_learn_publish_and_collect_again(vllm_server: Any, chat: Any, tmp_path: Path) -> None:
    episodes = collect(vllm_server, chat, range(8))
    assert {branch.policy_versions for episode in episodes for branch in episode.branches} == {(0, 0)}
    assert all(call.untrainable_reason is None for e in episodes for b in e.branches for call in b.calls)
    scorer = ModelScorer(seed_path())
    assert parity(scorer, episodes) < 1e-4
    ReplayStore.open(tmp_path / "store").append(episodes)

    learner = Learner(load_model(seed_path(), chat), RunConfig().learn)
    registry = PolicyRegistry(tmp_path / "policies", base_model=str(seed_path()))
    registry.publish(learner.policy(), learner_step=0)
    for _ in range(2):
        report = learner.step(rows_of(chat, episodes), 0)
    assert report.n_trained == len(episodes)
    registry.publish(learner.policy(), learner_step=2)

    pusher = make_pusher("reload", registry)
    try:
        pushed = pusher.push(registry, 1, [vllm_server.url])
        assert pushed.ok, pushed
        again = collect(vllm_server, chat, range(8, 16))
    finally:
        assert pusher.push(registry, 0, [vllm_server.url]).ok
    assert {branch.policy_versions for episode in again for branch in episode.branches} == {(1, 1)}
    assert parity(scorer, again) > 1e-3  # they are no longer the first version's
    scorer.load(registry.load(1))
    assert parity(scorer, again) < BOUND
    ReplayStore.open(tmp_path / "store").append(again)
    assert engine_of(vllm_server, chat).version == 0


def test_the_first_step_on_fresh_episodes_has_ratio_one(vllm_server: Any, chat: Any) -> None:
    learner = Learner(load_model(seed_path(), chat), RunConfig().learn)
    metrics = learner.step(rows_of(chat, collect(vllm_server, chat, range(4))), 0).metrics
    assert metrics["learn/ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["learn/ratio/max"] == pytest.approx(1.0, abs=1e-3)


def test_doctor_finds_nothing_wrong(vllm_server: Any, tmp_path: Path) -> None:
    from agentsdpo.doctor import examine

    checks = list(examine(vllm_server.url, str(seed_path()), store=str(tmp_path), update=True))
    wrong = [check.line() for check in checks if check.state != "ok" and check.name != "disk"]
    assert not wrong, wrong
    assert json.dumps([check.as_json() for check in checks])
