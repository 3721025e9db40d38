"""Verbs that keep a store in order: dry runs change nothing, ``--yes`` does what was said."""

import json
import os
import shlex
import time
from pathlib import Path

import pytest
from replay_factories import make_episode
from test_replay_cli import call, content, document, good, lines, refused
from test_replay_verify import forge

from agentsdpo.replay import Key, ReplayStore, to_rows
from agentsdpo.replay.cli import choose
from agentsdpo.replay.sampling.index import SideIndex, Use


def episodes(root: Path) -> set[str]:
    return {key.episode_id for key in ReplayStore.open(root, create=False).snapshot().rows}


ALL = {"aaaa-1", "bbbb-2", "cccc-3", "cccc-4", "dddd-5"}
DESTRUCTIVE = [("evict", "--max-staleness", "1"), ("evict", "--where", "env_id == 'other'"), ("rm", "aaaa"),
               ("gc", "--grace", "0s"), ("unevict",)]


@pytest.mark.parametrize("words", DESTRUCTIVE, ids=" ".join)
def test_destructive_verbs_change_nothing_without_yes(words: tuple[str, ...], own: Path) -> None:
    before = content(own)
    verb, *more = words
    found = good(verb, own, *more)
    assert "would" in found.stdout
    assert "--yes" in found.stderr
    assert document(verb, own, *more)["dry_run"]
    assert content(own) == before


def test_evict_hides_whole_groups_and_unevict_shows_them_again(own: Path) -> None:
    found = document("evict", own, "--max-staleness", "2", "--yes")
    assert found["keys"] == ["cccc-3/0/0", "cccc-4/0/0"]
    assert found["reason"] == "max_staleness 2"
    assert episodes(own) == ALL - {"cccc-3", "cccc-4"}
    assert "evict max_staleness 2" in good("log", own).stdout
    assert "none of 2 hidden" in refused(4, "unevict", own, "aaaa")
    assert "show 2 branches" in good("unevict", own, "cccc-3", "--yes").stdout
    assert episodes(own) == ALL


def test_evict_by_each_bound(own: Path) -> None:
    def would(*words: str) -> set[str]:
        return {key.split("/")[0] for key in document("evict", own, *words)["keys"]}

    assert would("--max-staleness", "2", "--current", "9") == ALL
    assert would("--max-staleness", "2", "--where", "env_id == 'desk'") == set()
    assert would("--max-age", "1h") == set()
    time.sleep(0.01)
    assert would("--max-age", "0.001s") == ALL
    assert would("--max-bytes", "1GB") == set()
    assert would("--max-bytes", "0B") == ALL
    size = document("stats", own)["segment_bytes"]
    assert would("--max-bytes", f"{size - 100}B") == {"cccc-3", "cccc-4"}


def test_evict_by_uses_needs_the_index(own: Path, tmp_path: Path) -> None:
    store = ReplayStore.open(own)
    SideIndex(tmp_path / "side.sqlite", store.about["store_id"]).put([
        (Key("aaaa-1", 0, 0), Use(3, 1, 1.0)), (Key("cccc-3", 0, 0), Use(9, 1, 1.0))])
    found = document("evict", own, "--max-uses", "3", "--index", tmp_path / "side.sqlite")
    assert found["keys"] == ["aaaa-1/0/0"]  # cccc-4, of the group of cccc-3, was never drawn
    assert "belong together" in refused(2, "evict", own, "--max-uses", "3")
    assert "no side index" in refused(4, "evict", own, "--max-uses", "3", "--index", tmp_path / "none")
    SideIndex(tmp_path / "theirs.sqlite", "another store")
    (tmp_path / "notes.txt").write_text("years of work")
    for name in ("theirs.sqlite", "notes.txt"):
        before = (tmp_path / name).read_bytes()
        said = refused(1, "evict", own, "--max-uses", "3", "--index", tmp_path / name)
        assert f"{name} is no side index of store" in said
        assert (tmp_path / name).read_bytes() == before, "a file that is named by mistake stays what it is"


def test_evict_refuses_to_hide_everything_and_what_it_cannot_read(own: Path) -> None:
    assert "no bound is given" in refused(2, "evict", own)
    assert "--max-age is 'old'" in refused(2, "evict", own, "--max-age", "old")
    assert "--max-bytes is '5 parsecs'" in refused(2, "evict", own, "--max-bytes", "5 parsecs")


def test_bounds_choose_the_least(own: Path) -> None:
    view = ReplayStore.open(own).snapshot()
    both = choose.superfluous(view, choose.Bounds(max_staleness=2, max_bytes=1 << 30), view.keys())
    assert both == choose.superfluous(view, choose.Bounds(max_staleness=2), view.keys())
    assert choose.superfluous(view, choose.Bounds(), view.keys()) == []


def test_rm_takes_ids_by_their_beginnings(own: Path) -> None:
    assert "hid 3 branches of 2 episodes" in good("rm", own, "aaaa", "bbbb", "--yes", "--reason", "secret").stdout
    assert episodes(own) == ALL - {"aaaa-1", "bbbb-2"}
    assert "evict secret" in good("log", own).stdout
    assert "2 episode ids start with" in refused(2, "rm", own, "cccc", "--yes")
    refused(4, "rm", own, "aaaa", "--yes")


def test_gc_deletes_after_the_grace_what_no_pin_holds(own: Path) -> None:
    good("pin", own, "learner-1", "--ttl", "1h")
    good("evict", own, "--where", "episode_id == 'aaaa-1'", "--yes")
    assert document("gc", own, "--grace", "0s", "--yes")["named"] == []
    good("unpin", own, "learner-1")
    path, = document("gc", own, "--yes")["named"]
    assert (own / path).exists()
    refused(1, "unevict", own, "aaaa", "--yes")
    time.sleep(0.01)
    assert document("gc", own, "--grace", "0s", "--yes")["deleted"] == [path]
    assert not (own / path).exists()
    assert episodes(own) == ALL - {"aaaa-1"}


def test_pins_are_listed_and_released(own: Path) -> None:
    assert lines("pin", own) == []
    assert [row["reader"] for row in lines("pin", own, "a")] == ["a"]
    pin = own / "pins" / "a.json"
    os.utime(pin, (1, 1))
    assert [row["standing"] for row in lines("pin", own)] == [False]
    assert "no pin of 'b' among 1" in refused(4, "unpin", own, "b")
    assert "no pin for reader '../x'" in refused(2, "pin", own, "../x")
    assert "--ttl is '1 fortnight'" in refused(2, "pin", own, "a", "--ttl", "1 fortnight")


def test_snapshot_folds_the_log_and_shows_the_same(own: Path) -> None:
    before = document("stats", own)
    found = document("snapshot", own)
    assert (own / found["path"]).exists()
    assert found["branches"] == 6
    assert document("stats", own) == before


def test_log_reads_a_store_that_was_maintained(own: Path) -> None:
    good("evict", own, "--where", "env_id == 'other'", "--yes")
    good("snapshot", own)
    assert [entry["writer"] for entry in lines("log", own, "--writer", "maint")] == ["maint"]


def test_labels_rewards_and_hints_come_late(own: Path, tmp_path: Path) -> None:
    assert document("label", own, "checked", "--where", "env_id == 'other'")["added"] == 2
    assert {row["episode_id"] for row in lines("ls", own, "--where", "label == 'checked'")} == {"cccc-3", "cccc-4"}
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"episode_id": "aaaa-1", "reward": 0.125}\n\n'
                     '{"episode_id": "bbbb-2", "branch_id": 1, "reward": 1}\n')
    good("label", own, "--from", notes, "--kind", "reward", "--author", "me")
    rewards = {(row["episode_id"], row["branch_id"]): row["reward"] for row in lines("ls", own)}
    assert (rewards["aaaa-1", 0], rewards["bbbb-2", 1], rewards["bbbb-2", 0]) == (0.125, 1.0, None)
    hint = json.dumps({"episode_id": "dddd-5", "hint": {"text": "look twice", "source": "user", "author": "me"}})
    good("label", own, "--from", "-", "--kind", "hint", input=hint + "\n")
    assert "hint (user, by me): look twice" in good("show", own, "dddd").stdout
    good("label", own, "--from", "-", "--kind", "hint", input='{"episode_id": "dddd-5", "hint": "look thrice"}\n')
    assert "hint (user, by user): look thrice" in good("show", own, "dddd").stdout
    good("label", own, "--from", "-", "--kind", "hint", "--author", "bob",
         input='{"episode_id": "dddd-5", "hint": "look again"}\n')
    assert "hint (user, by bob): look again" in good("show", own, "dddd").stdout
    good("label", own, "--from", "-", "--kind", "hint", "--author", "bob", input=hint + "\n")
    assert "hint (user, by me): look twice" in good("show", own, "dddd").stdout, "a line knows better"


@pytest.mark.parametrize(("line", "said"), [
    ('{"episode_id": "aaaa-1"}', "'label' is missing"), ("[]", "not an object"), ("{", "line 1 is no label"),
    ('{"episode_id": "aaaa-1", "label": 3}', "are texts"), ('{"episode_id": "a", "label": "x", "y": 1}', "it has 'y'"),
    ('{"episode_id": "a", "label": "x"}\n{"episode_id": "a", "label": "y"}', "line 2 is about a"),
    ('{"episode_id": "a", "branch_id": "zero", "label": "x"}', "line 1 is no label"),
    ('{"episode_id": "aaaa-1", "branch_id": 0.9, "label": "x"}', "branch_id and attempt are integers"),
    ("[" * 100_000, "line 1 is no label")])
def test_a_line_that_is_no_label_is_named_and_nothing_is_added(line: str, said: str, own: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text(line)
    before = content(own)
    assert said in refused(2, "label", own, "--from", tmp_path / "notes")
    assert content(own) == before


def test_label_refuses_what_is_not_clear(own: Path, tmp_path: Path) -> None:
    for words in ([], ["x"], ["--where", "reward > 0"], ["x", "--where", "reward > 0", "--from", "f"],
                  ["--from", "f", "--kind", "nosuch"]):
        assert "not clear" in refused(2, "label", own, *words)
    assert "cannot be read" in refused(4, "label", own, "--from", tmp_path / "none")
    (tmp_path / "n").write_text('{"episode_id": "nosuch", "reward": 1}')
    shown = " ".join(refused(1, "label", own, "--from", tmp_path / "n", "--kind", "reward").split())
    assert f"list what there is: agentsdpo replay ls {own}" in shown
    (tmp_path / "h").write_text('{"episode_id": "aaaa-1", "hint": {"text": "x"}}')
    said = refused(2, "label", own, "--from", tmp_path / "h", "--kind", "hint")
    assert "source: Field required" in said
    assert '"source": "user", "author": "me"}' in said, "the shape is shown"
    (tmp_path / "h").write_text('{"episode_id": "aaaa-1", "hint": 3}')
    assert "a hint is a text or an object" in refused(2, "label", own, "--from", tmp_path / "h", "--kind", "hint")


def test_a_slot_that_is_taken_exits_5(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentsdpo.replay.log import WriterFenced

    def taken(*args: object, **more: object) -> None:
        raise WriterFenced("maintenance was taken over", fix="run it again")

    monkeypatch.setattr("agentsdpo.replay.upkeep.maintain.commit", taken)
    result = call("rm", own, "aaaa", "--yes")
    assert (result.exit_code, result.stderr) == (5, "agentsdpo: maintenance was taken over; run it again\n")


def test_a_read_only_store_is_an_error_that_says_so(own: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    for folder in [own, *own.rglob("*")]:
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    try:
        assert "write permission" in refused(1, "rm", own, "aaaa", "--yes")
        good("ls", own)
    finally:
        for folder in [own, *own.rglob("*")]:
            folder.chmod(0o755)


def test_a_group_of_rollouts_leaves_together(tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "s")
    store.append([make_episode(i, episode_id=f"e-{i}", group_id="g", group_size=2, version=i) for i in range(2)])
    assert document("rm", tmp_path / "s", "e-0")["keys"] == ["e-0/0/0", "e-1/0/0"]


def test_what_verify_says_about_a_conflict_can_be_done(own: Path) -> None:
    forge(ReplayStore.open(own), to_rows([make_episode(9, episode_id="dddd-5", group_size=1)]), "other")
    result = call("verify", own, "--json")
    (problem,) = json.loads(result.stdout)["problems"]
    assert (result.exit_code, problem["key"]) == (3, "dddd-5/0/0")
    program, room, *words = shlex.split(problem["fix"].removeprefix("give both up: "))
    assert (program, room) == ("agentsdpo", "replay")
    assert "5 branches are left" in good(*words).stdout
    good("verify", own)
