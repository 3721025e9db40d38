"""Files of others, and hostile ones: read as far as they go, never trained on, refused with the place of the fault."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_factories import make_episode

from agentsdpo.errors import ConfigError, FormatError, StoreError, TrainForbidden
from agentsdpo.replay import ReplayStore
from agentsdpo.replay.formats import ImportReport, export, import_
from agentsdpo.replay.formats.assembly import Recorded, assemble
from agentsdpo.replay.rules import check_episode
from agentsdpo.types import Episode


def trajectory(**fields: Any) -> dict[str, Any]:
    """A small ATIF document of somebody else, with ids and log-probs."""
    steps = [
        {"step_id": 1, "source": "system", "message": "Be brief."},
        {"step_id": 2, "source": "user", "message": "1 + 2?", "timestamp": "2026-01-02T03:04:05Z"},
        {"step_id": 3, "source": "agent", "message": "", "reasoning_content": "hm", "model_name": "m",
         "tool_calls": [{"tool_call_id": "a", "function_name": "calc", "arguments": {"expr": "1+2"}}],
         "observation": {"results": [{"source_call_id": "a", "content": "3"}]},
         "metrics": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_token_ids": [1, 2, 3],
                     "completion_token_ids": [4, 5], "logprobs": [-0.5, -0.25]}},
        {"step_id": 4, "source": "agent", "message": "3.", "metrics": {
            "prompt_token_ids": [1, 2, 3, 4, 5, 6], "completion_token_ids": [7], "logprobs": [-1]}}]
    return {"schema_version": "ATIF-v1.6", "session_id": "s-1", "steps": steps,
            "agent": {"name": "other", "version": "2", "model_name": "big", "tool_definitions": [{"type": "function"}]},
            "extra": {"train_allowed": True}} | fields


def bring(store: ReplayStore, folder: Path, document: Any, fmt: str = "atif", **options: Any) -> ImportReport:
    """Import one document from a file."""
    path = folder / "foreign.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return import_(store, fmt, path, **options)


@pytest.fixture(scope="module")
def barred(tmp_path_factory: pytest.TempPathFactory) -> ReplayStore:
    """A store that nothing must ever get into."""
    return ReplayStore.open(tmp_path_factory.mktemp("barred") / "store")


def only(store: ReplayStore) -> Episode:
    episode, = store.episodes()
    return episode


@pytest.mark.parametrize("minor", range(9))
def test_every_version_of_atif_is_read(minor: int, tmp_path: Path, store: ReplayStore) -> None:
    report = bring(store, tmp_path, trajectory(schema_version=f"ATIF-v1.{minor}"))
    assert (report.added, report.trainable, report.untrainable) == (1, 0, {"kind_unknown": 2})
    assert report.lost == {"steps[].model_name": 1, "steps[].timestamp": 1}
    episode = only(store)
    branch, = episode.branches
    assert branch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert branch.token_kind.tolist() == [0, 0, 0, 4, 4, 2, 4]
    assert branch.logprobs[[3, 4, 6]].tolist() == [-0.5, -0.25, -1.0]
    assert {call.logprob_kind for call in branch.calls} == {"unknown"}
    assert [m["role"] for m in episode.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert episode.messages[2]["reasoning_content"] == "hm"
    assert episode.metadata["source"] == {"format": "atif", "id": "s-1"}
    assert episode.metadata["atif"]["agent"] == {"name": "other", "version": "2"}
    assert (episode.model_id, episode.tools) == ("big", ({"type": "function"},))
    assert store.sampler().sample(1, learner_version=0) == []


@pytest.mark.parametrize("version", ["ATIF-v1.9", "ATIF-v2.0", "ATIF-v1.08", "1.6", ""])
def test_other_versions_are_refused(version: str, tmp_path: Path, barred: ReplayStore) -> None:
    with pytest.raises(FormatError, match="is none of ATIF-v1.0 to ATIF-v1.8"):
        bring(barred, tmp_path, trajectory(schema_version=version))


PLACES = [(), ("agent",), ("steps", 2), ("steps", 2, "tool_calls", 0), ("steps", 2, "observation"),
          ("steps", 2, "observation", "results", 0), ("steps", 2, "metrics")]


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_field_is_an_error_that_names_its_path(place: tuple[Any, ...], tmp_path: Path,
                                                          barred: ReplayStore) -> None:
    document: Any = trajectory()
    at = document
    for part in place:
        at = at[part]
    at["invented"] = 1
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in (*place, "invented"))[1:]
    with pytest.raises(FormatError) as caught:
        bring(barred, tmp_path, document)
    assert f"foreign.json: {path}: " in str(caught.value)
    assert len(barred) == 0


def changed(**step: Any) -> dict[str, Any]:
    """The trajectory with other fields in its third step."""
    document = trajectory()
    document["steps"][2] |= step
    return document


HOSTILE = {
    "gap in step ids": changed(step_id=4), "step id twice": changed(step_id=2), "step id zero": changed(step_id=0),
    "step id text": changed(step_id="3"), "step id true": changed(step_id=True),
    "unknown source": changed(source="robot"), "message a number": changed(message=3),
    "message missing": {**trajectory(), "steps": [{"step_id": 1, "source": "user"}]},
    "steps an object": trajectory(steps={}), "no agent": {k: v for k, v in trajectory().items() if k != "agent"},
    "bad time": changed(timestamp="yesterday"), "metrics of a user": changed(source="user"),
    "deterministic with metrics": changed(llm_call_count=0), "negative count": changed(llm_call_count=-1),
    "ids too large": changed(metrics={"prompt_token_ids": [2**31], "completion_token_ids": [1]}),
    "ids negative": changed(metrics={"prompt_token_ids": [-1], "completion_token_ids": [1]}),
    "ids fractions": changed(metrics={"prompt_token_ids": [1.0], "completion_token_ids": [1]}),
    "logprobs text": changed(metrics={"prompt_token_ids": [1], "completion_token_ids": [1], "logprobs": ["a"]}),
    "result of an unknown call": changed(observation={"results": [{"source_call_id": "z", "content": "3"}]}),
    "tool call id twice": changed(tool_calls=2 * [{"tool_call_id": "a", "function_name": "f", "arguments": {}}]),
    "arguments a text": changed(tool_calls=[{"tool_call_id": "a", "function_name": "f", "arguments": "{}"}]),
    "reference to nothing": changed(observation={"results": [{"subagent_trajectory_ref": [{}]}]}),
    "embedded without an id": trajectory(subagent_trajectories=[trajectory()]),
    "embedded ids twice": trajectory(subagent_trajectories=2 * [trajectory(trajectory_id="x")]),
    "an image without a source": changed(message=[{"type": "image"}]),
    "a list": [1, 2], "a number": 3, "null": None, "not json": "{", "NaN": '{"a": NaN}',
    "infinity": "-Infinity", "too large": json.dumps(trajectory(extra={"a": 12345})).replace("12345", "1e999"),
    "too long": json.dumps(trajectory(extra={"a": 12345})).replace("12345", 400 * "9" + ".0"),
    "deep": "[" * 100_000, "nested": json.dumps(changed(extra={"a": json.loads("[" * 300 + "]" * 300)})),
    "our data of another kind": trajectory(extra={"agentsdpo": []}),
    "our data, newer": trajectory(extra={"agentsdpo": {"v": 2}}),
    "our data, deep": trajectory(extra={"agentsdpo": {"v": 1, "json": "[" * 100_000}}),
    "our data, empty": trajectory(extra={"agentsdpo": {"v": 1}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_documents_are_refused_and_nothing_is_written(name: str, tmp_path: Path, barred: ReplayStore) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps(trajectory()))
    bad = tmp_path / "bad.json"
    bad.write_text(HOSTILE[name] if isinstance(HOSTILE[name], str) else json.dumps(HOSTILE[name]))
    with pytest.raises(FormatError, match=r"bad\.json"):
        import_(barred, "atif", [good, bad])
    assert len(barred) == 0


@settings(max_examples=50)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(["messages", "nodes", "steps", "agent", "v", "traces", "role", "parent",
                                         "message", "token_ids", "mask", "schema_version", "content"]), inner)),
       st.sampled_from(["archipelago", "atif", "hf", "verifiers"]))
def test_any_json_is_an_import_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, value: Any,
                                                fmt: str) -> None:
    from agentsdpo.replay.formats.importing import IMPORTS
    from agentsdpo.replay.formats.reading import Notes

    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    try:
        for found in IMPORTS[fmt](path, Notes(), frozenset()):
            check_episode(found.episode.model_copy(update={"train_allowed": True}))
    except FormatError as error:
        assert str(path) in str(error)  # noqa: PT017 - either is fine, anything else is not


REASONS = {
    "aggregated_calls": {"llm_call_count": 2}, "imported": {"is_copied_context": True},
    "no_token_ids": {"metrics": {"completion_token_ids": [4, 5]}},
    "no_logprobs": {"metrics": {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5]}},
    "length_mismatch": {"metrics": {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5], "logprobs": [-1]}},
    "logprob_sentinel": {"metrics": {"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5],
                                     "logprobs": [-1, -9999.0]}},
    "multimodal": {"message": [{"type": "text", "text": "see"}, {"type": "image", "source": {
        "media_type": "image/png", "path": "../../etc/passwd"}}]},
}


@pytest.mark.parametrize("reason", REASONS)
def test_each_call_says_why_it_is_not_trained_on(reason: str, tmp_path: Path, store: ReplayStore) -> None:
    report = bring(store, tmp_path, changed(**REASONS[reason]))
    second = "multimodal" if reason == "multimodal" else "kind_unknown"
    calls = [call for branch in only(store).branches for call in branch.calls]
    assert [call.untrainable_reason for call in calls] == [reason, second]
    assert report.trainable == 0
    if reason == "imported":
        assert only(store).messages[2]["weight"] == 0
        assert only(store).branches[0].token_kind.tolist() == [0, 0, 0, 0, 0, 0, 4]
    if reason in ("aggregated_calls", "no_token_ids"):
        assert report.lost["steps[].metrics.completion_token_ids without their prompt"] == 1


def test_a_prompt_that_does_not_extend_opens_a_branch() -> None:
    calls = [Recorded("a", 0, [1, 2], [3, 4], [-1, -1]), Recorded("b", 1, [1, 2, 3, 4, 5], [6], [-1]),
             Recorded("c", 2, [1, 2, 9, 9], [3], [-1]), Recorded("d", 3, [1, 2, 3, 4, 5, 6], [7], None),
             Recorded("e", 4, [1, 2, 9, 9, 3, 8], [], None)]
    first, second = assemble(calls)
    assert (first.token_ids.tolist(), first.token_kind.tolist()) == ([1, 2, 3, 4, 5, 6, 7], [0, 0, 4, 4, 2, 4, 5])
    assert (second.parent_branch_id, second.fork_at, second.fork_reason) == (0, 2, "template_rewrite")
    assert (second.token_ids.tolist(), second.token_kind.tolist()) == ([1, 2, 9, 9, 3, 8], [0, 0, 0, 0, 4, 2])
    assert [call.call_id for call in (*first.calls, *second.calls)] == ["a", "b", "d", "c", "e"]
    check_episode(make_episode(branches=(first, second)))


def test_sub_agents_are_branches_and_their_talk_is_kept(tmp_path: Path, store: ReplayStore) -> None:
    deep = trajectory(trajectory_id="deep")
    sub = trajectory(trajectory_id="sub", subagent_trajectories=[deep])
    bring(store, tmp_path, trajectory(subagent_trajectories=[sub]))
    episode = only(store)
    assert [branch.fork_reason for branch in episode.branches] == [None, "subagent", "subagent"]
    assert [branch.fork_at for branch in episode.branches] == [None, 0, 0]
    assert [entry["id"] for entry in episode.metadata["subagents"]] == ["sub", "deep"]
    assert episode.metadata["subagents"][0]["messages"][1]["content"] == "1 + 2?"


def refer(path: str) -> dict[str, Any]:
    return changed(observation={"results": [{"source_call_id": "a", "content": "3", "subagent_trajectory_ref": [
        {"session_id": "x", "trajectory_path": path}]}]})


def test_a_sub_agent_in_a_file_of_the_folder_is_followed_once(tmp_path: Path, store: ReplayStore) -> None:
    (tmp_path / "subs").mkdir()
    (tmp_path / "subs" / "one.json").write_text(json.dumps(refer("subs/one.json")))
    bring(store, tmp_path, refer("subs/one.json"))
    assert [branch.fork_reason for branch in only(store).branches] == [None, "subagent"]


def test_a_sub_agent_that_is_imported_itself_is_not_followed(tmp_path: Path, store: ReplayStore) -> None:
    (tmp_path / "one.json").write_text(json.dumps(trajectory(session_id="one")))
    (tmp_path / "two.json").write_text(json.dumps(refer("one.json")))
    report = import_(store, "atif", [tmp_path / "one.json", tmp_path / "two.json"])
    assert (report.added, report.branches) == (2, 2)


@pytest.mark.parametrize("named", ["../outside.json", "{outside}", "link.json", "folder/../../outside.json",
                                   "https://example.invalid/x.json", "file:///etc/passwd", "missing.json", "a\0b.json",
                                   "folder", "secret.txt", "~/x.json", ""])
def test_no_reference_leads_out_of_the_folder(named: str, tmp_path: Path, store: ReplayStore) -> None:
    """What lies outside would be an error if it were opened."""
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    (tmp_path / "outside.json").write_text("poison")
    (home / "secret.txt").write_text("poison")
    (home / "link.json").symlink_to(tmp_path / "outside.json")
    document = refer(named.replace("{outside}", str(tmp_path / "outside.json")))
    report = bring(store, home, document)
    assert report.lost["subagent_trajectory_ref that cannot be followed"] == 1
    with pytest.raises(FormatError, match="would lose .*cannot be followed"):
        bring(ReplayStore.open(tmp_path / "strict"), home, document, strict=True)


def test_strict_turns_loss_into_an_error_before_anything_is_written(tmp_path: Path, store: ReplayStore) -> None:
    with pytest.raises(FormatError, match=r"would lose steps\[\]\.model_name \(1\), steps\[\]\.timestamp \(1\)"):
        bring(store, tmp_path, trajectory(), strict=True)
    assert len(store) == 0
    whole = trajectory()
    whole["steps"][1].pop("timestamp")
    whole["steps"][2].pop("model_name")
    assert bring(store, tmp_path, whole, strict=True).added == 1


def test_nobody_trains_on_what_is_not_allowed(tmp_path: Path, store: ReplayStore) -> None:
    silent, closed = trajectory(extra=None), trajectory(extra={"train_allowed": False})
    with pytest.raises(TrainForbidden, match="does not say train_allowed"):
        bring(store, tmp_path, silent)
    for said in (False, True):
        with pytest.raises(TrainForbidden, match="for evaluation only"):
            bring(store, tmp_path, closed, train_allowed=said)
        with pytest.raises(TrainForbidden, match="for evaluation only"):
            bring(store, tmp_path, trajectory(session_id="mercor/apex-agents-v1/3"), train_allowed=said)
    assert len(store) == 0
    assert bring(store, tmp_path, silent, train_allowed=True).added == 1
    assert only(store).train_allowed


def test_the_same_conversation_twice_is_one(tmp_path: Path, store: ReplayStore) -> None:
    assert bring(store, tmp_path, trajectory()).added == 1
    assert bring(store, tmp_path, trajectory()).duplicates == 1
    other = trajectory()
    other["steps"][3]["message"] = "Three."
    assert bring(store, tmp_path, other).added == 1


def test_an_edited_export_is_not_taken_for_the_original(tmp_path: Path, store: ReplayStore) -> None:
    store.append([make_episode(messages=({"role": "user", "content": "do"}, {"role": "assistant", "content": "done"}))])
    export(store, "atif", tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    edited = copy.deepcopy(document)
    edited["steps"][1]["message"] = "not done"
    other = ReplayStore.open(tmp_path / "other")
    with pytest.raises(FormatError, match="was changed after the export"):
        bring(other, tmp_path, edited)
    tampered = copy.deepcopy(document)
    tampered["extra"]["agentsdpo"]["branches"][0]["logprobs"][0] = -0.5
    with pytest.raises(FormatError, match="carries a log-prob"):
        bring(other, tmp_path, tampered)
    tampered = copy.deepcopy(document)
    tampered["extra"]["agentsdpo"]["branches"][0]["token_ids"][0] ^= 1
    with pytest.raises(FormatError, match="was changed after the export"):
        bring(other, tmp_path, tampered)
    del edited["extra"]
    assert bring(other, tmp_path, edited, train_allowed=True).untrainable == {"no_token_ids": 1}


# ---------------------------------------------------------------------------------------------- other formats

CHATS = {
    "messages[0].role": {"messages": [{"role": "robot", "content": "x"}]},
    "messages[0].content": {"messages": [{"role": "user", "content": 3}]},
    "has no content": {"messages": [{"role": "user"}]},
    "belong to the assistant": {"messages": [{"role": "user", "content": "", "tool_calls": [
        {"function": {"name": "f"}}]}]},
    "messages[0].tool_calls[0].function.name": {"messages": [{"role": "assistant", "tool_calls": [
        {"function": {"name": 1}}]}]},
    "messages: ": {"messages": "hello"}, "Field required": {"prompt": "x"}, "tools is no list": {
        "messages": [], "tools": '{"a": 1}'}, "tools is no JSON": {"messages": [], "tools": "["},
}


@pytest.mark.parametrize("problem", CHATS)
def test_odd_chats_are_refused(problem: str, tmp_path: Path, barred: ReplayStore) -> None:
    with pytest.raises(FormatError) as caught:
        bring(barred, tmp_path, CHATS[problem], "openai", train_allowed=True)
    assert problem in str(caught.value)


def test_columns_of_chats_that_find_no_place_are_counted(tmp_path: Path, store: ReplayStore) -> None:
    line = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "refusal": None}],
            "source": "web", "score": 3, "empty": None, "reward": 0.5, "task_id": "t", "train_allowed": True}
    report = bring(store, tmp_path, line, "hf")
    assert report.lost == {"score": 1, "source": 1}
    assert (only(store).reward, only(store).task_id) == (0.5, "t")
    export(store, "hf", tmp_path / "again.jsonl")
    assert json.loads((tmp_path / "again.jsonl").read_text())["reward"] == 0.5


def traces(**fields: Any) -> dict[str, Any]:
    """One line of a traces.jsonl: a prompt, two answers to it, and a second turn after the first."""
    nodes = [{"message": {"role": "user", "content": "x"}, "token_ids": [1, 2], "mask": [False, False]},
             {"parent": 0, "message": {"role": "assistant", "content": "a"}, "sampled": True, "token_ids": [3, 4, 5],
              "mask": [False, True, True], "logprobs": [-0.5, -0.25], "is_content": [False, True, True]},
             {"parent": 0, "message": {"role": "assistant", "content": "b"}, "sampled": True, "token_ids": [3, 6],
              "mask": [False, True], "logprobs": [-0.5]},
             {"parent": 1, "message": {"role": "tool", "tool_call_id": "c", "content": "t"}, "token_ids": [7],
              "mask": [False]},
             {"parent": 3, "message": {"role": "assistant", "content": None, "tool_calls": [
                 {"id": "c", "name": "f", "arguments": "{}"}]}, "sampled": True, "token_ids": [8], "mask": [True],
              "logprobs": [-1]}]
    trace = {"id": "t-1", "nodes": nodes, "calls": [{"node": 1, "finish_reason": "stop", "model": "m", "sampling": {
        "temperature": 0.5}}], "rewards": {"a": {"score": 1.0, "weight": 0.5}, "b": {"score": 0.5}},
        "stop_condition": "max_turns", "info": {"train_allowed": True}} | fields
    return {"id": "e-1", "env": {"id": "math"}, "task": {"key": "k"}, "group": {"id": "g-1"}, "traces": [trace],
            "run": {"id": "r", "work": {"policy": {"start": 4, "end": 4}}}}


@pytest.mark.parametrize("bare", [False, True])
def test_shared_prefixes_are_trained_once(bare: bool, tmp_path: Path, store: ReplayStore) -> None:
    line = traces()["traces"][0] if bare else traces()
    report = bring(store, tmp_path, line, "verifiers")
    assert (report.added, report.trainable, report.untrainable) == (1, 0, {"kind_unknown": 3})
    assert report.lost == {"traces[].nodes[].is_content": 1}
    episode = only(store)
    first, second = episode.branches
    assert (first.token_ids.tolist(), first.token_kind.tolist()) == ([1, 2, 3, 6], [0, 0, 0, 4])
    assert (second.token_ids.tolist(), second.token_kind.tolist()) == ([1, 2, 3, 4, 5, 7, 8], [0, 0, 0, 4, 4, 2, 4])
    assert (second.parent_branch_id, second.fork_at) == (0, 2)
    assert second.calls[0].sampling.temperature == 0.5
    assert (episode.reward, str(episode.stop_reason)) == (1.0, "max_turns")
    assert [m["content"] for m in episode.messages] == ["x", "a", "t", None]
    assert (episode.env_id, episode.task_id, episode.group_id) == (("imported", episode.task_id, "") if bare else (
        "math", "k", "g-1"))
    assert second.policy_versions == (-1, -1)  # another run's versions are not those of this store
    assert episode.metadata["verifiers"]["run"] == (None if bare else traces()["run"])


def nodes_with(at: int, **fields: Any) -> dict[str, Any]:
    """The line with other fields in one node."""
    line = traces()
    line["traces"][0]["nodes"][at] |= fields
    return line


TRACES = {
    "parents come before": nodes_with(1, parent=3), "nodes[0].parent is 0": nodes_with(0, parent=0),
    "nodes[1].parent is -1": nodes_with(1, parent=-1), "mask entries": nodes_with(1, mask=[True]),
    "no list of token ids": nodes_with(1, token_ids=[3, 2**31, 5]), "message: role": nodes_with(1, message={"role": 3}),
    "logprobs": nodes_with(1, logprobs=["x", "y"]), "temperature": traces(calls=[{"node": 1, "sampling": {
        "temperature": -1}}]),
}


@pytest.mark.parametrize("problem", TRACES)
def test_odd_traces_are_refused(problem: str, tmp_path: Path, barred: ReplayStore) -> None:
    with pytest.raises(FormatError) as caught:
        bring(barred, tmp_path, TRACES[problem], "verifiers")
    assert problem in str(caught.value)
    assert len(barred) == 0


@pytest.mark.parametrize(("fields", "reason"), [
    ({"logprobs": []}, "no_logprobs"), ({"logprobs": [-1]}, "length_mismatch"),
    ({"logprobs": [-1, 0.5]}, "logprob_sentinel"), ({"token_ids": [], "mask": [], "logprobs": []}, "no_token_ids")])
def test_traces_with_odd_numbers_keep_their_tokens(fields: dict[str, Any], reason: str, tmp_path: Path,
                                                   store: ReplayStore) -> None:
    report = bring(store, tmp_path, nodes_with(1, **fields), "verifiers")
    assert report.untrainable == {"kind_unknown": 2, reason: 1}


def test_files_that_are_not_there_or_no_text(tmp_path: Path, store: ReplayStore) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        import_(store, "atif", tmp_path / "missing.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(FormatError, match=r"bytes\.jsonl:1 is no JSON"):
        import_(store, "hf", tmp_path / "bytes.jsonl")
    (tmp_path / "text.parquet").write_text("PAR1")
    for fmt in ("hf", "parquet"):
        with pytest.raises(FormatError, match=r"text\.parquet"):
            import_(store, fmt, tmp_path / "text.parquet")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert import_(store, "hf", tmp_path / "empty.jsonl").episodes == 0
    with pytest.raises(ConfigError, match="nothing to import"):
        import_(store, "hf", [])


def test_log_probs_of_others_are_kept_to_the_bit(tmp_path: Path, store: ReplayStore) -> None:
    values = [float(np.float32(-0.1)), -1e-45]
    bring(store, tmp_path, changed(metrics={"prompt_token_ids": [1, 2, 3], "completion_token_ids": [4, 5],
                                            "logprobs": values}))
    kept = only(store).branches[0].logprobs[3:5]
    assert kept.tobytes() == np.array(values, np.float32).tobytes()
