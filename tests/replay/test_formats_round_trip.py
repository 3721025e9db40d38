"""What goes out comes back: every bit where the format has room for it, the conversation where it has not."""

import json
from pathlib import Path
from typing import Any

import atif as judge
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from replay_factories import make_branch, make_episode, same_branch, same_episode

from agentsdpo.errors import ConfigError, FormatError, StoreError, TokenizerMismatch
from agentsdpo.replay import ReplayStore, compact
from agentsdpo.replay.formats import atif, export, import_, portable, traces, verifiers
from agentsdpo.replay.formats.bag import Stored
from agentsdpo.replay.formats.reading import Notes
from agentsdpo.types import Branch, Call, Episode, Grade, Hint, Sampling, StopReason, VersionSpan

RNG = np.random.default_rng(0)
WHOLE = ("atif", "verifiers", "parquet")
"""Formats that carry everything."""
TOOLS = ({"type": "function", "function": {"name": "calc", "description": "Adds.", "parameters": {"type": "object"}}},)


def talk(answer: str = "It is 3.") -> tuple[dict[str, Any], ...]:
    """A conversation of two turns with a tool call."""
    return ({"role": "system", "content": "You are at a desk."},
            {"role": "user", "content": "What is 1 + 2? \U0001f600"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "call_0_0", "type": "function", "function": {"name": "calc", "arguments": {"expr": "1+2"}}}]},
            {"role": "tool", "tool_call_id": "call_0_0", "content": "3"}, {"role": "assistant", "content": answer})


def fork(parent: Branch, at: int, branch_id: int, reason: Any, version: int = 3) -> Branch:
    """A child that repeats ``parent`` up to ``at``, then two tokens of context and two sampled ones."""
    ids = np.concatenate([parent.token_ids[:at], np.array([5, 6, 7, 8], np.int32)])
    logps = np.array([np.nan] * (at + 2) + [-0.5, -0.0], np.float32)
    call = Call(call_id=f"c{branch_id}", turn=1, start=at + 2, end=at + 4, finish_reason="stop", sampling=Sampling(),
                prompt_sha256="", versions=(VersionSpan(version=version, start=0, end=1),
                                            VersionSpan(version=version + 1, start=1, end=2)))
    return Branch(branch_id=branch_id, parent_branch_id=parent.branch_id, fork_at=at, fork_reason=reason,
                  token_ids=ids, token_kind=np.array([0] * (at + 2) + [1, 1], np.uint8), logprobs=logps, calls=(call,))


def rich(seed: int = 0, **fields: Any) -> Episode:
    """An episode with a compaction, a sub-agent, kept sets, a masked call, tools and everything else set."""
    rng = np.random.default_rng(seed)
    root = make_branch(rng, turns=2, version=[3, 4], sampling=Sampling(top_k=5), size=40)
    sets = [sorted({int(t), 1, 999}) for t in root.token_ids[np.isin(root.token_kind, (1, 4, 5))]]
    root = root.model_copy(update={"kept_ids": np.array([i for s in sets for i in s], np.int32),
                                   "kept_counts": np.array([len(s) for s in sets], np.int32)})
    branches = (root, fork(root, 12, 1, "compaction"), fork(root, 0, 2, "subagent"))
    return make_episode(seed, branches=branches, messages=talk(), tools=TOOLS, attempt=2,
                        stop_reason=StopReason.MAX_TURNS, **fields)


def through(fmt: str, episodes: list[Episode], folder: Path) -> list[Episode]:
    """Episodes after an export and an import into an empty store, in their order; ids and source put back."""
    old, new = ReplayStore.open(folder / "old"), ReplayStore.open(folder / "new")
    old.append(episodes)
    report = export(old, fmt, folder / "file.jsonl")
    assert report.episodes == len(episodes)
    assert report.bytes == (folder / "file.jsonl").stat().st_size
    back = import_(new, fmt, folder / "file.jsonl", strict=True)
    assert (back.added, back.duplicates, back.lost) == (len(episodes), 0, {})
    found = {}
    for episode in new.episodes():
        source = episode.metadata.pop("source")
        assert source["format"] == fmt
        assert episode.episode_id != source["id"]
        found[source["id"]] = episode.model_copy(update={"episode_id": source["id"]})
    return [found[episode.episode_id] for episode in episodes]


@pytest.mark.parametrize("fmt", WHOLE)
def test_everything_survives(fmt: str, tmp_path: Path) -> None:
    bare = Branch(token_ids=np.zeros(0, np.int32), token_kind=np.zeros(0, np.uint8), logprobs=np.zeros(0, np.float32))
    empty = Episode(episode_id="e", task_id="t", env_id="desk", branches=(bare,), train_allowed=True,
                    stop_reason=StopReason.ENGINE_ERROR)
    episodes = [rich(0), make_episode(1, kind=5), make_episode(2, kind=4, hint=False, grade=None), empty]
    for before, after in zip(episodes, through(fmt, episodes, tmp_path), strict=True):
        assert same_episode(before, after)


@pytest.mark.parametrize("fmt", WHOLE)
def test_episodes_that_failed_before_their_first_call_are_not_one(fmt: str, tmp_path: Path) -> None:
    bare = Branch(token_ids=np.zeros(0, np.int32), token_kind=np.zeros(0, np.uint8), logprobs=np.zeros(0, np.float32))
    episodes = [make_episode(i, episode_id=f"e{i}", branches=(bare,)) for i in range(3)]
    assert [episode.task_id for episode in through(fmt, episodes, tmp_path)] == ["task-0", "task-1", "task-2"]


@st.composite
def any_episode(draw: st.DrawFn) -> Episode:
    """Calls of 0-3 tokens, ids up to 2**31 - 1, log-probs down to -999 and up to -0.0, any text in messages."""
    ids: list[int] = []
    kinds: list[int] = []
    logps: list[float] = []
    calls = []
    for turn in range(draw(st.integers(0, 3))):
        context = draw(st.lists(st.integers(0, 2**31 - 1), max_size=2))
        sampled = draw(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.sampled_from([1, 4, 5]),
                                          st.floats(-999, 0, width=32) | st.just(-0.0)), max_size=3))
        ids += [*context, *(one[0] for one in sampled)]
        kinds += [draw(st.sampled_from([0, 2, 3])) for _ in context] + [one[1] for one in sampled]
        logps += [np.nan] * len(context) + [np.nan if kind == 5 else logp for _, kind, logp in sampled]
        start = len(ids) - len(sampled)
        spans = (VersionSpan(version=draw(st.integers(-1, 2**62)), start=0, end=len(sampled)),) if sampled else ()
        calls.append(Call(call_id=draw(st.text(st.characters(codec="utf-8"), max_size=3)), turn=turn, start=start,
                          end=len(ids), prompt_sha256="", versions=spans, finish_reason="stop",
                          sampling=Sampling(seed=draw(st.integers(0, 2**62))),
                          logprob_kind=draw(st.sampled_from(["processed", "raw", "unknown"]))))
    branch = Branch(token_ids=np.array(ids, np.int32), token_kind=np.array(kinds, np.uint8),
                    logprobs=np.array(logps, np.float32), calls=tuple(calls))
    text = st.text(st.characters(), max_size=6)  # lone surrogates as well
    values = st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    trees = st.recursive(values | text, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner,
                                                                                                   max_size=2))
    roles = st.sampled_from(["system", "user", "assistant", "tool", "odd"])
    messages = draw(st.lists(st.fixed_dictionaries({"role": roles, "content": text}, optional={"extra": trees}),
                             max_size=4))
    hint = Hint(text="x", source="user", author="me")
    return make_episode(draw(st.integers(0, 9)), branches=(branch,), vocab_size=0, messages=tuple(messages),
                        metadata=draw(st.dictionaries(text, trees, max_size=2)) | {"z": 1},
                        hint=draw(st.booleans()), grade=draw(st.sampled_from([None, Grade(
                            results=(), mean=0.1, passed=None, feedback="\u2028")]))).model_copy(
                                update={"hint": draw(st.sampled_from([None, hint]))})


READ = {"atif": atif.read, "verifiers": traces.read, "parquet": portable.read}


def write(path: Path, fmt: str, episode: Episode) -> None:
    """One episode in a file, without a store."""
    if fmt == "parquet":
        with open(path, "wb") as file, portable.Writer(file) as writer:
            writer.write(Stored(episode, "sealed", {}))
    else:
        document = {"atif": atif.document, "verifiers": verifiers.document}[fmt]
        path.write_text(json.dumps(document(Stored(episode, "sealed", {}))))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episode=any_episode())
def test_any_episode_survives(tmp_path: Path, episode: Episode) -> None:
    for fmt in WHOLE:
        write(tmp_path / "file", fmt, episode)
        found, = READ[fmt](tmp_path / "file", Notes(), frozenset())
        assert same_episode(episode, found.episode), fmt
        assert (found.stamp, found.salvaged) == (True, False)


@pytest.mark.parametrize("fmt", [*WHOLE, "openai", "hf"])
def test_a_second_import_adds_nothing(fmt: str, tmp_path: Path, store: ReplayStore) -> None:
    store.append([rich(seed) for seed in range(3)])
    export(store, fmt, tmp_path / "out.jsonl")
    other = ReplayStore.open(tmp_path / "other")
    vouch = fmt == "openai"
    first = import_(other, fmt, tmp_path / "out.jsonl", train_allowed=vouch)
    assert first.episodes == 3
    again = import_(other, fmt, [tmp_path / "out.jsonl", tmp_path / "out.jsonl"], train_allowed=vouch)
    assert (again.episodes, again.added, again.duplicates) == (6, 0, 6)
    assert len({row.key.episode_id for row in other.branches()}) == first.added
    if fmt in WHOLE:
        assert import_(store, fmt, tmp_path / "out.jsonl").added == 0


def test_data_files_alone_give_every_episode_once(tmp_path: Path, store: ReplayStore) -> None:
    """Without a log: rows that were compacted stand in two files, salvaged ones beside the whole that came later."""
    store.append([make_episode(1, episode_id="cut", size=24)], salvaged=True)
    store.append([make_episode(2, episode_id="lost", size=24)], salvaged=True)
    compact(store)
    store.append([make_episode(3, episode_id="cut", size=40)])
    other = ReplayStore.open(tmp_path / "other")
    report = import_(other, "parquet", sorted(store.root.glob("data/*/*.parquet")))
    assert (report.episodes, report.added, report.duplicates) == (5, 2, 3)
    assert sorted(episode.metadata["source"]["id"] for episode in other.episodes()) == ["cut", "lost"]
    assert sorted(other.to_arrow()["n_tokens"].to_pylist()) == [24, 40]


@pytest.mark.parametrize("fmt", WHOLE)
def test_late_values_and_statuses_travel(fmt: str, tmp_path: Path, store: ReplayStore) -> None:
    store.append([make_episode(1, episode_id="whole")])
    store.append([make_episode(2, episode_id="cut")], salvaged=True)
    store.add_rewards({"whole": 0.125})
    store.add_hints({"whole": Hint(text="later", source="user", author="me")})
    store.add_labels({"whole": "seen", "cut": "seen"})
    assert export(store, fmt, tmp_path / "out").skipped == {"labels": 2}
    assert export(store, fmt, tmp_path / "out", where="reward == 0.125").skipped == {"labels": 1}
    export(store, fmt, tmp_path / "out")
    other = ReplayStore.open(tmp_path / "other")
    import_(other, fmt, tmp_path / "out")
    late = next(other.episodes("reward == 0.125"))
    assert late.hint is not None
    assert late.hint.text == "later"
    assert other.snapshot().scalars("status == 'salvaged'").num_rows == 1


@pytest.mark.parametrize("fmt", WHOLE)
def test_a_policy_version_is_the_same_weights_everywhere(fmt: str, tmp_path: Path, store: ReplayStore) -> None:
    manifest = {"weights_id": "w", "tokenizer_sha256": "a" * 64, "vocab_size": 1000, "note": "private"}
    store.record_policy(3, manifest)
    store.append([rich()])
    export(store, fmt, tmp_path / "out")
    other, third = ReplayStore.open(tmp_path / "other"), ReplayStore.open(tmp_path / "third")
    import_(other, fmt, tmp_path / "out")
    assert other.policy(3) == {name: value for name, value in manifest.items() if name != "note"}
    third.record_policy(3, {**manifest, "weights_id": "else"})
    with pytest.raises(StoreError, match="policy version 3 is recorded with weights_id 'else', not 'w'"):
        import_(third, fmt, tmp_path / "out")
    fourth = ReplayStore.open(tmp_path / "fourth")
    fourth.record_policy(4, {"tokenizer_sha256": "c" * 64})
    with pytest.raises(TokenizerMismatch):
        import_(fourth, fmt, tmp_path / "out")
    assert len(third) == len(fourth) == 0


@pytest.mark.parametrize("fmt", ["openai", "hf"])
def test_conversations_come_back_as_data_to_read(fmt: str, tmp_path: Path, store: ReplayStore) -> None:
    store.append([rich()])
    export(store, fmt, tmp_path / "chats.jsonl")
    other = ReplayStore.open(tmp_path / "other")
    report = import_(other, fmt, tmp_path / "chats.jsonl", train_allowed=True)
    assert (report.added, report.trainable, report.untrainable) == (1, 0, {"no_token_ids": 2})
    episode = next(other.episodes())
    assert episode.tools == TOOLS
    assert [m["role"] for m in episode.messages] == [m["role"] for m in talk()]
    assert json.loads(episode.messages[2]["tool_calls"][0]["function"]["arguments"]) == {"expr": "1+2"}
    row, = other.branches()
    assert not other.snapshot().rows[row.key].trainable
    assert other.snapshot().scalars().column("untrainable_reason").to_pylist() == ["no_token_ids"]
    assert other.sampler().sample(1, learner_version=0) == []
    export(other, fmt, tmp_path / "again.jsonl")
    lines = [json.loads((tmp_path / name).read_text()) for name in ("chats.jsonl", "again.jsonl")]
    assert lines[0]["messages"] == lines[1]["messages"]
    assert lines[0]["tools"] == lines[1]["tools"]


def test_the_atif_export_satisfies_an_independent_judge(tmp_path: Path, store: ReplayStore) -> None:
    odd = make_episode(3, messages=({"role": "user", "content": "\ud800"}, {"role": "tool", "content": "who?"},
                                    {"role": "assistant", "content": None, "tool_calls": [
                                        {"function": {"name": "f", "arguments": "{"}}]}))
    store.append([rich(episode_id="rich"), make_episode(1, messages=()), odd])
    export(store, "atif", tmp_path / "out.jsonl")
    judged = [judge.Trajectory.model_validate_json(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert {one.schema_version for one in judged} == {"ATIF-v1.8"}
    first = next(one for one in judged if one.trajectory_id == "rich")
    assert [len(sub.steps) for sub in first.subagent_trajectories or ()] == [1]
    once, twice = [step for step in first.steps if step.source == "agent"]  # taken again after the compaction
    assert (once.llm_call_count, twice.llm_call_count) == (1, 2)
    assert once.metrics is not None
    assert once.metrics.logprobs is not None
    assert twice.metrics is not None
    assert twice.metrics.completion_token_ids is None


def test_the_steps_hold_what_was_sampled(tmp_path: Path, store: ReplayStore) -> None:
    episode = make_episode(0, turns=2, size=40, messages=talk())
    store.append([episode])
    export(store, "atif", tmp_path / "out.json")
    steps = json.loads((tmp_path / "out.json").read_text())["steps"]
    branch = episode.branches[0]
    agent = [step for step in steps if step["source"] == "agent"]
    for step, call in zip(agent, branch.calls, strict=True):
        assert step["metrics"]["completion_token_ids"] == branch.token_ids[call.start:call.end].tolist()
        assert np.array_equal(np.float32(step["metrics"]["logprobs"]), branch.logprobs[call.start:call.end])
        assert step["metrics"]["prompt_tokens"] == call.start
    assert steps[2]["observation"]["results"] == [{"source_call_id": "call_0_0", "content": "3"}]


def test_verifiers_nodes_hold_each_token_once(tmp_path: Path, store: ReplayStore) -> None:
    episode = rich()
    store.append([episode])
    export(store, "verifiers", tmp_path / "traces.jsonl")
    trace = json.loads((tmp_path / "traces.jsonl").read_text())["traces"][0]
    nodes = trace["nodes"]
    inner = {node["parent"] for node in nodes}
    paths = []
    for leaf in (i for i in range(len(nodes)) if i not in inner):
        path, at = [], leaf
        while at is not None:
            path.append(at)
            at = nodes[at]["parent"]
        paths.append([token for i in reversed(path) for token in nodes[i].get("token_ids", [])])
    assert sorted(paths) == sorted(branch.token_ids.tolist() for branch in episode.branches)
    trained = sum(sum(node.get("mask", [])) for node in nodes)
    assert trained == sum(branch.n_trainable for branch in episode.branches)
    assert all(len(node.get("logprobs", [])) == sum(node.get("mask", [])) for node in nodes)


def test_a_verifiers_file_of_others_trains_shared_prefixes_never_twice(tmp_path: Path, store: ReplayStore) -> None:
    episode = rich()
    store.append([episode])
    export(store, "verifiers", tmp_path / "traces.jsonl")
    record = json.loads((tmp_path / "traces.jsonl").read_text())
    record["traces"][0]["info"] = {"note": 1}
    record["traces"][0]["timing"] = {"start": 1.0}
    (tmp_path / "foreign.jsonl").write_text(json.dumps(record))
    other = ReplayStore.open(tmp_path / "other")
    report = import_(other, "verifiers", tmp_path / "foreign.jsonl", train_allowed=True)
    assert (report.trainable, report.lost) == (0, {"traces[].timing": 1})
    found = next(other.episodes())
    assert {tuple(b.token_ids.tolist()) for b in found.branches} == {tuple(b.token_ids.tolist())
                                                                    for b in episode.branches}
    assert sum(b.n_sampled for b in found.branches) == sum(b.n_sampled for b in episode.branches)
    assert set(report.untrainable) == {"kind_unknown"}
    assert found.reward == episode.reward
    ours = np.concatenate([b.logprobs[b.token_kind == 1] for b in episode.branches])
    theirs = np.concatenate([b.logprobs[b.token_kind == 4] for b in found.branches])
    assert np.array_equal(np.sort(ours), np.sort(theirs))


def test_parquet_is_read_by_anything_and_checked_by_us(tmp_path: Path, store: ReplayStore) -> None:
    store.append([rich(seed) for seed in range(2)])
    report = export(store, "parquet", tmp_path / "out.parquet", limit=1)
    table = pq.read_table(tmp_path / "out.parquet")
    assert (report.episodes, report.records, len(table)) == (1, 3, 3)
    other = ReplayStore.open(tmp_path / "other")
    changed = table.set_column(table.schema.get_field_index("content_sha256"), table.schema.field("content_sha256"),
                               table["tokens_sha256"])
    pq.write_table(changed, tmp_path / "changed.parquet")
    with pytest.raises(ValueError, match="does not hash"):
        import_(other, "parquet", tmp_path / "changed.parquet")
    assert len(other) == 0


def test_no_flipped_bit_of_a_parquet_export_is_silent(tmp_path: Path) -> None:
    write(tmp_path / "out", "parquet", rich())
    whole, = READ["parquet"](tmp_path / "out", Notes(), frozenset())
    data, rng, silent = (tmp_path / "out").read_bytes(), np.random.default_rng(0), 0
    for at in rng.integers(0, 8 * len(data), 150).tolist():
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        (tmp_path / "bad").write_bytes(flipped)
        try:
            found, = READ["parquet"](tmp_path / "bad", Notes(), frozenset())
        except FormatError as error:
            assert str(tmp_path / "bad") in str(error)  # noqa: PT017 - most raise, harmless ones do not
            continue
        silent += not same_episode(found.episode, whole.episode)
    assert silent == 0


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, store: ReplayStore) -> None:
    store.append([rich()])
    export(store, "hf", tmp_path / "out.jsonl")
    before = (tmp_path / "out.jsonl").read_bytes()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(store, "atif", tmp_path / "out.jsonl", progress=stop)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []
    with pytest.raises(StoreError, match="cannot be written"):
        export(store, "atif", tmp_path / "no" / "folder.jsonl")


def test_reports_progress_and_filters(tmp_path: Path, store: ReplayStore) -> None:
    store.append([make_episode(seed) for seed in range(4)])
    seen: list[tuple[int, int]] = []
    report = export(store, "hf", tmp_path / "out", where="task_id != 'task-1'", limit=2,
                    progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert report.as_json()["episodes"] == 2
    with pytest.raises(ConfigError, match="no export format 'xml'; use one of atif"):
        export(store, "xml", tmp_path / "out")
    with pytest.raises(ConfigError, match="no import format 'sts'"):
        import_(store, "sts", tmp_path / "out")


def test_pairs_prefer_the_better_reward_and_share_the_prompt(tmp_path: Path, store: ReplayStore) -> None:
    def attempt(seed: int, reward: float | None, answer: str, **fields: Any) -> Episode:
        grade = None if reward is None else Grade(results=(), mean=reward, passed=None)
        return make_episode(seed, task_id="t", messages=talk(answer), grade=grade, **fields)

    store.append([attempt(0, 1.0, "It is 3."), attempt(1, 0.0, "It is 4."), attempt(2, 0.5, "Hm."),
                  attempt(3, None, "?"), attempt(4, 0.2, "5", group_id="other"),
                  attempt(5, 0.4, "6", group_id="other", run_id="elsewhere")])
    report = export(store, "pairs", tmp_path / "pairs.jsonl")
    line, = (json.loads(text) for text in (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert line["prompt"][-1]["role"] == "tool"
    assert ([m["content"] for m in line["chosen"]], [m["content"] for m in line["rejected"]]) == (
        ["It is 3."], ["It is 4."])
    assert (line["score_chosen"], line["score_rejected"]) == (1.0, 0.0)
    assert report.skipped == {"episodes without a partner": 3, "episodes without a reward": 1}
    assert (report.records, report.episodes) == (1, 2)


def test_data_sets_take_the_messages(tmp_path: Path, store: ReplayStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One type per column: what Arrow infers from the lines is what a data set is made of."""
    import pyarrow.json as pj

    store.append([rich(0), make_episode(1, messages=({"role": "user", "content": [{"type": "text", "text": "x"}]},
                                                     {"role": "assistant", "content": None}))])
    export(store, "hf", tmp_path / "chats.jsonl")
    table = pj.read_json(tmp_path / "chats.jsonl")
    assert str(table.schema.field("tools").type) == "string"
    assert {field.name for field in table.schema.field("messages").type.value_type} == {
        "role", "content", "tool_calls", "tool_call_id"}
    pq.write_table(table, tmp_path / "chats.parquet")
    other = ReplayStore.open(tmp_path / "other")
    assert import_(other, "hf", tmp_path / "chats.parquet").added == 2
    assert any(episode.tools == TOOLS for episode in other.episodes())
    assert not any("tool_calls" in episode.messages[0] for episode in other.episodes())


def test_sts_is_a_session_and_its_messages(tmp_path: Path, store: ReplayStore) -> None:
    store.append([rich(episode_id="one")])
    with pytest.raises(ConfigError, match="nothing took secrets out"):
        export(store, "sts", tmp_path / "out.jsonl")
    export(store, "sts", tmp_path / "out.jsonl", checked=True)
    head, *rest = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (head["type"], head["id"], head["harness"]) == ("session", "one", "agentsdpo")
    assert [line["message"]["role"] for line in rest] == [m["role"] for m in talk()]


def test_same_branch_sees_bits() -> None:
    """The oracle of this file: a log-prob of -0.0 is not 0.0."""
    branch = make_branch(RNG, size=8, turns=1)
    zero = branch.logprobs.copy()
    zero[-1] = 0.0
    minus = zero.copy()
    minus[-1] = -0.0
    assert not same_branch(branch.model_copy(update={"logprobs": zero}),
                           branch.model_copy(update={"logprobs": minus}))
