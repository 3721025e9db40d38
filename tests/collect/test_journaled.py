"""Episodes are journaled as they grow: what anybody acts on is on disk first, and a cut-off episode is not lost."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.chat import ChatFormat
from agentsdpo.collect.collector import Collector
from agentsdpo.collect.config import CollectConfig
from agentsdpo.replay import ReplayStore, Spool
from agentsdpo.replay.journal import JournalError
from agentsdpo.replay.salvage import Salvage, salvage
from agentsdpo.replay.upkeep.recover import recover
from agentsdpo.types import Completion, Episode


class Watched:
    """A collector over the counter world that looks into the journal whenever engine or environment are asked."""

    def __init__(self, world: Any, tokenizer: Any, folder: Path, *texts: str, durability: Any = "step",
                 evaluate: bool = False) -> None:
        chat, watched = ChatFormat(tokenizer), self
        self.seen: list[tuple[str, Salvage]] = []
        self.store = ReplayStore.open(folder / "store")
        self.spool = Spool(self.store, durability)

        class Engine(world.text_engine):
            async def complete(self, *args: Any, **named: Any) -> Completion:
                watched.look("call")
                if self.texts and self.texts[0] == "stop":
                    raise asyncio.CancelledError
                return await super().complete(*args, **named)

        class Env(world.env):
            async def call(self, calls: Any) -> Any:
                watched.look("tools")
                return await super().call(calls)

        class Suite(world.suite):
            def env(self) -> Any:
                return Env()

        self.collector = Collector.of_engine(Suite(), Engine(chat, *texts), chat, CollectConfig(window=4000),
                                             run_id="run", evaluate=evaluate, spool=self.spool)

    @property
    def journals(self) -> list[Path]:
        return sorted(self.store.root.glob("spool/*/*/*.arrows"))

    def look(self, at: str) -> None:
        self.seen += [(at, salvage(path)) for path in self.journals]

    def collect(self) -> list[Episode]:
        return self.collector.collect("train", [3])


@pytest.fixture
def texts(world: Any) -> list[str]:
    return [world.write("add", {"n": 1}), world.write("get", {}) + world.write("add", {"n": 2}), "It is 3."]


@pytest.mark.parametrize("durability", ["step", "episode"])
def test_calls_and_results_are_in_the_journal_before_anybody_acts_on_them(
        world: Any, tiny_tokenizer: Any, tmp_path: Path, texts: list[str], durability: str) -> None:
    watched = Watched(world, tiny_tokenizer, tmp_path, *texts, durability=durability)
    (episode,) = watched.collect()
    assert [(at, left.steps, left.lost) for at, left in watched.seen] == [
        ("call", 0, ""), ("tools", 1, ""), ("call", 2, ""), ("tools", 3, ""), ("call", 4, "")]
    for at, left in watched.seen[1:]:
        assert left.episode is not None
        assert left.episode.messages == episode.messages[:len(left.episode.messages)]
        assert left.episode.messages[-1]["role"] == ("assistant" if at == "tools" else "tool")
        calls = left.episode.branches[0].calls
        assert calls == episode.branches[0].calls[:len(calls)]
        assert len(calls) == (left.steps + 1) // 2
    (path,) = watched.journals
    whole = salvage(path)
    assert whole.finished
    assert whole.episode is not None
    assert whole.episode.branches[0].token_ids.tolist() == episode.branches[0].token_ids.tolist()
    assert whole.episode.metadata.pop("salvaged")
    same = episode.model_fields_set - {"branches", "run_id"}
    assert {n: getattr(whole.episode, n) for n in same} == {n: getattr(episode, n) for n in same}
    watched.store.append([episode])
    watched.spool.seal([episode.episode_id])
    assert not watched.journals


def test_an_episode_cut_off_is_recovered(world: Any, tiny_tokenizer: Any, tmp_path: Path, texts: list[str]) -> None:
    watched = Watched(world, tiny_tokenizer, tmp_path, *texts[:2], "stop")
    with pytest.raises(asyncio.CancelledError):
        watched.collect()
    report = recover(watched.store)
    assert report.count("salvaged") == 1
    (key,) = watched.store.snapshot().keys()
    left = watched.store.episode(key.episode_id)
    assert watched.store.snapshot().rows[key].status == "salvaged"
    assert [len(branch.calls) for branch in left.branches] == [2]
    assert left.messages[-1]["content"] == "total 3"
    assert left.grade is None


def test_an_episode_played_again_supersedes_what_was_cut_off(world: Any, tiny_tokenizer: Any, tmp_path: Path,
                                                             texts: list[str]) -> None:
    watched = Watched(world, tiny_tokenizer, tmp_path, texts[0], "stop")
    with pytest.raises(asyncio.CancelledError):
        watched.collect()
    watched.collector.policy(None, 0).engine.texts[:] = texts  # pyright: ignore
    (episode,) = watched.collect()
    assert len(list(watched.store.root.glob("spool/*/lost+found/*.arrows"))) == 1
    assert salvage(watched.journals[0]).steps == 6
    watched.store.append([episode])


def test_what_may_not_be_stored_is_not_journaled(world: Any, tiny_tokenizer: Any, tmp_path: Path,
                                                 texts: list[str]) -> None:
    watched = Watched(world, tiny_tokenizer, tmp_path, *texts, evaluate=True)
    watched.collect()
    off = Watched(world, tiny_tokenizer, tmp_path / "off", *texts, durability="none")
    off.collect()
    assert watched.seen == off.seen == []
    assert not watched.journals + off.journals


def test_a_spool_that_cannot_be_written_stops_the_collection(world: Any, tiny_tokenizer: Any, tmp_path: Path,
                                                             texts: list[str]) -> None:
    watched = Watched(world, tiny_tokenizer, tmp_path, *texts)
    (tmp_path / "file").write_text("in the way")
    watched.spool.folder = tmp_path / "file"
    with pytest.raises(JournalError, match="cannot be written"):
        watched.collect()
