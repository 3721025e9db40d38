"""Episodes of the built-in world, played by the shipped model, through every format."""

import json
from pathlib import Path
from typing import Any

import atif
import pytest
import torch
from replay_factories import same_episode

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.collect.inprocess import InProcessEngine
from agentsdpo.envs.desk import DeskSuite
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.replay import ReplayStore
from agentsdpo.replay.cli.decode import decoder_for
from agentsdpo.replay.formats import export, import_
from agentsdpo.replay.formats.redact import Redactor
from agentsdpo.types import Episode


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> ReplayStore:
    """Six graded episodes of at most three turns."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    chat = ChatFormat(AutoTokenizer.from_pretrained(seed_path()))
    model = AutoModelForCausalLM.from_pretrained(seed_path(), dtype=torch.float32)
    engine = InProcessEngine(model, chat.eos_id, max_slots=6, version=3)
    config = CollectConfig(concurrency=6, max_tokens=48, max_turns=3)
    collector = Collector.of_engine(DeskSuite(), engine, chat, config, run_id="r", model_id="seed")
    store = ReplayStore.open(tmp_path_factory.mktemp("desk") / "store")
    store.append(collector.collect("train", [0, 0, 0, 1, 1, 2]))
    return store


def episodes(store: ReplayStore) -> dict[Any, Episode]:
    """By task and attempt, under the ids and with the metadata they had first."""
    found = {}
    for episode in store.episodes():
        metadata = {name: value for name, value in episode.metadata.items() if name != "source"}
        source = episode.metadata.get("source", {"id": episode.episode_id})
        found[episode.task_id, episode.attempt] = episode.model_copy(
            update={"metadata": metadata, "episode_id": source["id"]})
    return found


@pytest.mark.parametrize("fmt", ["atif", "verifiers", "parquet"])
def test_played_episodes_come_back_to_the_bit(fmt: str, desk: ReplayStore, tmp_path: Path) -> None:
    before = episodes(desk)
    export(desk, fmt, tmp_path / "out")
    other = ReplayStore.open(tmp_path / "other")
    report = import_(other, fmt, tmp_path / "out", strict=True)
    assert report.trainable == sum(branch.n_trainable for e in before.values() for branch in e.branches) > 0
    after = episodes(other)
    assert before.keys() == after.keys()
    assert all(same_episode(before[name], after[name]) for name in before)
    assert len(other.sampler().sample(6, learner_version=3)) == 6


def test_steps_are_turns(desk: ReplayStore, tmp_path: Path) -> None:
    export(desk, "atif", tmp_path / "out")
    for line in (tmp_path / "out").read_bytes().splitlines():
        judged = atif.Trajectory.model_validate_json(line)
        kept = json.loads(line)["extra"]["agentsdpo"]["branches"][0]
        agent = [step for step in judged.steps if step.source == "agent"]
        assert len(agent) == len(kept["calls"])
        sampled = [ids for step in agent if step.metrics for ids in step.metrics.completion_token_ids or ()]
        assert sampled == [i for i, k in zip(kept["token_ids"], kept["token_kind"], strict=True) if k in (1, 4, 5)]
        assert judged.agent.tool_definitions


def test_nothing_in_the_built_in_world_looks_like_a_secret(desk: ReplayStore, tmp_path: Path) -> None:
    redact = Redactor(emails=False, tokens="mask", decoder=lambda sha: decoder_for(sha, [seed_path()]))
    report = export(desk, "parquet", tmp_path / "redacted", redact=redact)
    export(desk, "parquet", tmp_path / "plain")
    assert report.redacted == {}
    stores = [ReplayStore.open(tmp_path / f"{name}-store") for name in ("redacted", "plain")]
    for name, store in zip(("redacted", "plain"), stores, strict=True):
        import_(store, "parquet", tmp_path / name)
    redacted, plain = map(episodes, stores)
    assert all(same_episode(redacted[name], plain[name]) for name in plain)


def test_data_sets_load_what_hf_writes(desk: ReplayStore, tmp_path: Path) -> None:
    import datasets

    export(desk, "hf", tmp_path / "chats.jsonl")
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "chats.jsonl"), split="train",
                                   cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 6
    assert {"system", "user", "assistant"} <= {m["role"] for talk in loaded["messages"] for m in talk}
    tools = json.loads(loaded["tools"][0])
    assert tools[0]["type"] == "function"
    loaded.to_parquet(tmp_path / "chats.parquet")
    other = ReplayStore.open(tmp_path / "other")
    assert import_(other, "hf", tmp_path / "chats.parquet").added == 6


def test_pairs_come_from_one_task(desk: ReplayStore, tmp_path: Path) -> None:
    names = {key.episode_id: i for i, key in enumerate(desk.snapshot().keys())}
    desk.add_rewards({name: float(place) for name, place in names.items()})
    report = export(desk, "pairs", tmp_path / "pairs.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert report.records == len(lines) > 0
    for line in lines:
        assert line["score_chosen"] > line["score_rejected"]
        assert [m["role"] for m in line["prompt"][:2]] == ["system", "user"]
        assert line["chosen"][0]["role"] == line["rejected"][0]["role"] == "assistant"
