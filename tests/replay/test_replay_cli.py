"""``agentsdpo replay``: every verb, wrong input of every kind, answers for people, pipes and programs."""

import errno
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from replay_factories import make_episode
from typer.testing import CliRunner, Result

from agentsdpo.cli import app
from agentsdpo.errors import StoreNotFound
from agentsdpo.offline import open_store
from agentsdpo.replay import Key, ReplayStore
from agentsdpo.replay.example import example


def call(*words: Any, **options: Any) -> Result:
    """Run ``agentsdpo replay ...`` in this process; a fault shows as it is."""
    result = CliRunner().invoke(app, ["replay", *map(str, words)], **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*words: Any, **options: Any) -> Result:
    result = call(*words, **options)
    assert result.exit_code == 0, result.stderr
    return result


def document(*words: Any) -> dict[str, Any]:
    """What ``--json`` prints, which must be one document and nothing else."""
    found = json.loads(good(*words, "--json").stdout)
    assert found["schema"] == f"agentsdpo-replay/{words[0]}/1"
    return found


def lines(*words: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in good(*words, "--jsonl").stdout.splitlines()]


def refused(code: int, *words: Any) -> str:
    """What a refused call says on stderr: one line, no traceback, nothing on stdout."""
    result = call(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def command(*words: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own."""
    options = {"capture_output": True, "text": True, "timeout": 120, **options}
    return subprocess.run([Path(sys.executable).with_name("agentsdpo"), "replay", *map(str, words)], **options)


# ---------------------------------------------------------------------------------------------------- all verbs


READING = [("ls",), ("ls", "--groups"), ("show", "--last"), ("stats",), ("stats", "--by", "env_id"), ("schema",),
           ("log",), ("tail",), ("sample",), ("sample", "--explain"), ("doctor",), ("sql", "SELECT 1")]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_reading_verbs_change_nothing_and_answer_in_every_form(words: tuple[str, ...], shared: Path) -> None:
    before = content(shared)
    verb, *more = words
    text = good(verb, shared, *more)
    assert text.stdout
    assert "\x1b" not in text.stdout + text.stderr
    assert document(verb, shared, *more)["store"] == str(shared)
    assert content(shared) == before


@pytest.mark.parametrize("verb", ["ls", "show", "stats", "schema", "log", "tail", "sample", "doctor", "sql", "view"])
def test_a_missing_store_is_not_found_and_not_made(verb: str, tmp_path: Path) -> None:
    more = {"show": ["--last"], "sql": ["SELECT 1"], "view": ["--create", tmp_path / "x.db"]}.get(verb, [])
    said = refused(4, verb, tmp_path / "none", *more)
    assert "is not a replay store" in said
    assert "agentsdpo replay init" in said
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_run_is_answered_with_its_stores(tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "one" / "replay")
    said = refused(4, "ls", tmp_path / "one")
    assert f"the store of this run is {tmp_path}/one/replay\n" in said
    assert "replay init" not in said
    for arm in ("naive", "robust"):
        ReplayStore.open(tmp_path / "demo" / "arms" / arm / "replay")
    for open_it in (open_store, lambda uri: ReplayStore.open(uri, create=False).about):
        with pytest.raises(StoreNotFound, match="the stores of this run are .*/arms/naive/replay, .*/arms/robust/repl"):
            open_it(tmp_path / "demo")
    with pytest.raises(StoreNotFound, match=r"STORE.json\); check the path$"):
        _ = ReplayStore.open(tmp_path / "none", create=False).about


@pytest.mark.parametrize("words", [("nosuchverb",), ("ls",), ("ls", "S", "--nosuch"), ("ls", "S", "--limit", "-1"),
                                   ("sample", "S", "-n", "0"), ("sample", "S", "-n", "two"), ("view", "S")])
def test_usage_errors_exit_2(words: tuple[str, ...]) -> None:
    assert refused(2, *words)


def test_both_json_forms_at_once_are_refused(shared: Path) -> None:
    assert "choose one" in refused(2, "ls", shared, "--json", "--jsonl")


# ------------------------------------------------------------------------------------------------- ls and stats


def test_ls_lists_the_newest_last_and_pins_its_keys(shared: Path) -> None:
    found = document("ls", shared)
    assert set(found) == {"schema", "store", "total", "branches"}
    assert [row["episode_id"] for row in found["branches"]] == [
        "aaaa-1", "bbbb-2", "bbbb-2", "cccc-3", "cccc-4", "dddd-5"]
    assert {"episode_id", "branch_id", "attempt", "reward", "policy_version_min", "n_tokens", "t_stored"} <= set(
        found["branches"][0])
    assert found["branches"][1]["reward"] is None
    assert lines("ls", shared) == found["branches"]


def test_ls_in_a_pipe_is_tab_separated_and_whole(shared: Path) -> None:
    rows = [line.split("\t") for line in good("ls", shared).stdout.splitlines()]
    assert len({len(row) for row in rows}) == 1
    assert rows[0][0] == "episode"
    assert len(rows) == 7


def test_ls_sorts_limits_and_chooses(shared: Path) -> None:
    assert [r["episode_id"] for r in lines("ls", shared, "--sort", "-policy_version", "--limit", "1")] == ["dddd-5"]
    chosen = good("ls", shared, "--columns", "episode,env", "--where", "env_id == 'other'", "-q")
    assert chosen.stdout.splitlines()[1:] == ["cccc-3\tother", "cccc-4\tother"]
    cut = good("ls", shared, "--limit", "2")
    assert "2 of 6 branches" in cut.stderr
    assert good("ls", shared, "--limit", "2", "-q").stderr == ""


def test_ls_names_the_nearest_column(shared: Path) -> None:
    assert "did you mean reward" in refused(2, "ls", shared, "--sort", "rewrd")
    assert "did you mean" in refused(2, "ls", shared, "--where", "rewrd > 1")
    assert "cannot be read" in refused(2, "ls", shared, "--where", "env_id ==")


def test_ls_groups_say_which_are_whole(tmp_path: Path, shared: Path) -> None:
    groups = {row["group_id"]: row for row in lines("ls", shared, "--groups")}
    assert groups["g-c"]["episodes"] == 2
    assert groups["g-c"]["whole"]
    store = ReplayStore.open(tmp_path / "s")
    store.append([make_episode(1, group_id="g", group_size=2)])
    assert [row["whole"] for row in lines("ls", tmp_path / "s", "--groups")] == [False]


def test_ls_groups_are_sorted_and_cut_as_branches_are(tmp_path: Path) -> None:
    store = ReplayStore.open(tmp_path / "s")
    for seed, group in enumerate("cab"):
        store.append([make_episode(seed, group_id=group, group_size=seed + 1)])

    def named(*words: str) -> list[str]:
        return [row["group_id"] for row in lines("ls", tmp_path / "s", "--groups", *words)]

    assert named() == ["c", "a", "b"], "the newest last"
    assert named("--sort", "group") == ["a", "b", "c"]
    assert named("--sort", "-group_size", "--limit", "2") == ["b", "a"], "the largest"
    assert named("--limit", "1") == ["b"]
    assert named("--limit", "0") == []
    assert "1 of 3 groups; more with --limit 3" in good("ls", tmp_path / "s", "--groups", "--limit", "1").stderr
    assert "choose from t_stored, group_id" in refused(2, "ls", tmp_path / "s", "--groups", "--sort", "env_id")


def test_an_empty_store_is_listed_without_a_fuss(tmp_path: Path) -> None:
    ReplayStore.open(tmp_path / "s")
    for words in (["ls"], ["ls", "--groups"], ["stats"], ["stats", "--by", "env"], ["schema"], ["tail"], ["log"],
                  ["sample"], ["sql", "SELECT count(*) FROM branches"]):
        good(words[0], tmp_path / "s", *words[1:])
    assert document("stats", tmp_path / "s")["branches"] == 0
    assert document("sql", tmp_path / "s", "SELECT count(*) n FROM branches")["rows"] == [{"n": 0}]
    assert "no episode" in refused(4, "show", tmp_path / "s", "--last")


def test_stats_count_what_is_there(shared: Path) -> None:
    found = document("stats", shared, "--current", "9")
    assert (found["branches"], found["episodes"], found["groups"], found["segments"]) == (6, 5, 4, 3)
    assert found["reward"] == {"n": 4, "min": 0.5, "mean": 0.5, "p95": 0.5, "max": 0.5}
    assert found["staleness"]["max"] == 8
    assert found["stop_reason"] == {"completed": 5, "max_turns": 1}
    assert found["status"] == {"sealed": 5, "truncated": 1}
    assert found["bytes_per_token"] > 0
    assert set(found) == {
        "schema", "store", "snapshot", "branches", "episodes", "groups", "tokens", "sampled", "trainable",
        "trainable_branches", "reward", "policy_version", "status", "stop_reason", "untrainable_reason", "staleness",
        "segments", "streams", "segment_bytes", "conflicts", "bytes_per_token"}


def test_stats_by_columns(shared: Path) -> None:
    found = document("stats", shared, "--by", "env,policy_version")["by"]
    assert [(row["env_id"], row["policy_version_min"], row["branches"]) for row in found] == [
        ("desk", 3, 3), ("desk", 4, 1), ("other", 1, 1), ("other", 2, 1)]
    assert "no column" in refused(2, "stats", shared, "--by", "nosuch")


def test_schema_adds_up_to_the_bytes_of_the_columns(shared: Path) -> None:
    columns = {row["column"]: row for row in lines("schema", shared)}
    assert columns["token_ids"]["type"].startswith("list<")
    assert "BYTE_STREAM_SPLIT" in columns["token_ids"]["encodings"]
    total = sum(row["bytes"] for row in columns.values())
    assert 0 < total < sum(path.stat().st_size for path in (shared / "data").rglob("*.parquet"))


# --------------------------------------------------------------------------------------------------------- show


def test_show_prints_the_conversation(shared: Path) -> None:
    text = good("show", shared, "aaaa").stdout
    assert "episode aaaa-1" in text
    assert "reward 0.5" in text
    assert "hint (feedback, by grader): write the file" in text
    assert "agent · turn 0 · policy 3" in text
    assert '{"name": "calc", "arguments": {"expr": "1+1"}}' in text
    assert "two é" in text
    assert "environment" in text


def test_show_says_when_it_was_and_how_long_it_took(tmp_path: Path) -> None:
    plain, begun = make_episode(1, turns=2), datetime(2026, 11, 22, 23, 59, 59, tzinfo=UTC)
    (branch,) = plain.branches
    calls = tuple(call.model_copy(update={"t_request": begun + timedelta(seconds=i),
                                          "t_done": begun + timedelta(seconds=i + 0.5)})
                  for i, call in enumerate(branch.calls))
    ReplayStore.open(tmp_path).append([plain.model_copy(update={"branches": (branch.model_copy(update={
        "calls": calls}),)})])
    assert "1.5 s from 2026-11-22 23:59:59 UTC" in good("show", tmp_path, "--last").stdout
    (row,) = document("ls", tmp_path, "--where", "t_end > '2026-11-23'")["branches"]
    assert row["episode_id"] == plain.episode_id
    assert document("ls", tmp_path, "--where", "t_start > '2026-11-23'")["branches"] == []


def test_show_defuses_what_would_steer_a_terminal(shared: Path) -> None:
    text = good("show", shared, "aaaa").stdout
    assert "\x1b" not in text
    assert "\u202e" not in text
    raw = document("show", shared, "aaaa", "--raw")["branches"][0]["text"]
    assert "\x1b[31mred\u202e naïve" in raw
    assert good("show", shared, "aaaa", "--raw").stdout == raw + "\n"


def test_show_as_json_has_every_token_once(shared: Path) -> None:
    found = document("show", shared, "aaaa")
    pieces = found["branches"][0]["segments"]
    assert [piece["writer"] for piece in pieces] == ["context", "agent", "environment", "agent"]
    assert [piece["start"] for piece in pieces[1:]] == [piece["end"] for piece in pieces[:-1]]
    assert pieces[-1]["end"] == found["episode"]["n_tokens"]
    assert set(found["episode"]) == {
        "episode_id", "attempt", "run_id", "env_id", "task_id", "group_id", "status", "stop_reason", "reward",
        "policy_versions", "n_tokens", "n_trainable", "model_id", "tokenizer_sha256", "hint", "grade", "metadata"}


def test_show_tokens_calls_and_messages(shared: Path) -> None:
    tokens = document("show", shared, "aaaa", "--tokens", "-4:")["tokens"]
    assert len(tokens) == 4
    assert "".join(token["text"] for token in tokens).endswith("é<|im_end|>")
    assert [token["logprob"] for token in tokens if token["kind"] != 1] == []
    calls = document("show", shared, "aaaa", "--calls")["calls"]
    assert [row["turn"] for row in calls] == [0, 1]
    n = calls[0]["end"] - calls[0]["start"]
    assert calls[0]["logprob"] == pytest.approx(-0.01 * (n - n // 2) - 5.0 * (n // 2))
    assert "→ calc(expr='1+1')" in good("show", shared, "aaaa", "--messages").stdout
    assert document("show", shared, "aaaa", "--messages")["messages"][0] == {"role": "user", "content": "Report."}


def test_show_without_a_tokenizer_prints_ids_and_says_so(shared: Path) -> None:
    found = good("show", shared, "cccc-3")
    assert "no tokenizer" in found.stderr
    assert "--model" in found.stderr
    ids = ReplayStore.open(shared).episode("cccc-3").branches[0].token_ids
    assert " ".join(map(str, ids[:20])) in found.stdout
    assert document("show", shared, "cccc-3")["branches"][0]["segments"][0]["text"] is None


def test_show_one_branch_of_several(shared: Path) -> None:
    assert "from branch 0 at token" in good("show", shared, "bbbb").stdout
    one = document("show", shared, "bbbb", "--branch", "1")
    assert [branch["branch_id"] for branch in one["branches"]] == [1]
    assert "branches 0, 1" in refused(4, "show", shared, "bbbb", "--branch", "7")
    assert "attempts 0" in refused(4, "show", shared, "bbbb", "--attempt", "3")


def test_show_the_gap_where_a_trainer_recorded_it(own: Path) -> None:
    assert "no trainer's log-probs" in refused(4, "show", own, "aaaa", "--gap")
    store = ReplayStore.open(own)
    key = Key("aaaa-1", 0, 0)
    behaviour = store.snapshot().read([key])[0].branch.logprobs
    store.add_relogprobs({key: behaviour - np.float32(0.5)}, policy_version=5, trainer_id="student")
    store.add_relogprobs({key: behaviour - np.float32(9)}, policy_version=5, trainer_id="teacher")
    tokens = [t for t in document("show", own, "aaaa", "--gap", "--tokens", ":")["tokens"] if t["kind"] == 1]
    assert tokens[0]["gap"] == pytest.approx(-8.5)
    text = good("show", own, "aaaa", "--gap", env={"FORCE_COLOR": "1", "NO_COLOR": None}).stdout
    assert "teacher at policy 5 minus student at policy 5" in text
    assert "48;2;0;114;178" in text  # blue: the student likes it more


def test_show_the_last_episode(shared: Path) -> None:
    assert document("show", shared, "--last")["episode"]["episode_id"] == "dddd-5"


def test_show_refuses_what_is_not_clear(shared: Path, tmp_path: Path) -> None:
    assert "2 episode ids start with 'cccc'" in refused(2, "show", shared, "cccc")
    assert "no episode id starts with" in refused(4, "show", shared, "nosuch")
    assert "or --last" in refused(2, "show", shared)
    assert "or --last" in refused(2, "show", shared, "aaaa", "--last")
    assert "exclude each other" in refused(2, "show", shared, "aaaa", "--raw", "--calls")
    for text in ("5", "x:3", "9:3", "99999:", ":0"):
        assert "--tokens" in refused(2, "show", shared, "aaaa", "--tokens", text)
    assert "no tokenizer.json" in refused(2, "show", shared, "aaaa", "--model", tmp_path)


def test_show_takes_the_tokenizer_of_the_run(tmp_path: Path, shared: Path) -> None:
    from agentsdpo.replay.cli import decode

    folder = decode.model_folders(str(tmp_path / "replay"), "seed")
    assert folder == [decode.SEED]
    (tmp_path / "config.toml").write_text('model = "/models/x"\n')
    assert decode.model_folders(str(tmp_path / "replay"), "tiny") == [Path("tiny"), Path("/models/x"), decode.SEED]
    assert "is not" in refused(1, "show", shared, "cccc-3", "--model", decode.SEED)


def test_unlikely_tokens_are_shaded_where_colours_are_on(shared: Path) -> None:
    env: dict[str, str | None] = {"FORCE_COLOR": "1", "NO_COLOR": None}
    text = good("show", shared, "aaaa", env=env).stdout
    assert "\x1b[37;48;2;143;19;19m" in text  # white on dark red: under 1 %
    assert "under 1 %" in text
    assert "\x1b" not in good("show", shared, "aaaa", "--no-color", env=env).stdout
    assert "\x1b" not in good("show", shared, "aaaa", env=env | {"NO_COLOR": "1"}).stdout


# ------------------------------------------------------------------------------------------- log, tail, sample


def test_log_lists_entries_and_finds_a_writer(shared: Path) -> None:
    entries = lines("log", shared)
    assert [entry["seq"] for entry in entries] == [0, 1, 2, 3, 4]
    assert entries[2]["operations"] == ["add 3 rows"]
    assert entries[-1]["operations"] == ["close"]
    assert lines("log", shared, "--writer", entries[0]["writer"][:9]) == entries
    assert "no stream" in refused(4, "log", shared, "--writer", "zz")


def test_tail_shows_the_newest(shared: Path) -> None:
    assert [row["episode_id"] for row in lines("tail", shared, "--fields", "episode")][-1] == "dddd-5"
    assert lines("tail", shared, "--since", "2999-01-01") == []
    assert len(lines("tail", shared, "--since", "1h")) == 6
    assert len(lines("tail", shared, "--since", "99999999999d")) == 6
    assert "write 90s" in refused(2, "tail", shared, "--since", "yesterday")


def test_tail_follows(own: Path) -> None:
    words = [Path(sys.executable).with_name("agentsdpo"), "replay", "tail", own, "-f", "--jsonl", "--every", "0.1",
             "--fields", "episode_id", "--where", "env_id != 'not'"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        first = [json.loads(child.stdout.readline())["episode_id"] for _ in range(6)]
        store = ReplayStore.open(own)
        store.append([make_episode(30, episode_id="not", env_id="not")])
        store.append([make_episode(31, episode_id="new")])
        assert json.loads(child.stdout.readline()) == {"episode_id": "new"}
        child.terminate()
    assert first[-1] == "dddd-5"


def test_sample_draws_as_a_learner_and_explains(shared: Path) -> None:
    drawn = document("sample", shared, "-n", "3", "--strategy", "fifo")["drawn"]
    assert [row["episode_id"] for row in drawn] == ["cccc-3", "cccc-4", "aaaa-1"]
    assert drawn == document("sample", shared, "-n", "3", "--strategy", "fifo")["drawn"]
    counts = document("sample", shared, "--explain", "--max-staleness", "2")["counts"]
    assert (counts["total"], counts["stale"], counts["eligible"]) == (6, 1, 5)
    assert "--strategy is 'nosuch'" in refused(2, "sample", shared, "--strategy", "nosuch")
    assert "nothing is eligible" in good("sample", shared, "--tokenizer", "0" * 64).stderr


def test_browse_leafs_filters_and_shows(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from agentsdpo.replay.cli.base import Out
    from agentsdpo.replay.cli.browse import Browser

    answers, pages = iter(["n", "p", "/ reward >", "/env_id == 'desk'", "1", "99", "/", "3", "q"]), list[str]()
    Browser(ReplayStore.open(shared), Out("browse"), ask=lambda prompt: next(answers), page=pages.append).run()
    text = capsys.readouterr().out
    assert "1 to 5 of 5" in text
    assert "1 to 3 of 3" in text
    assert "the filter 'reward >' cannot be read" in text
    assert "'99' is none of these" in text
    assert ["episode dddd-5" in pages[0], "episode cccc-3" in pages[1]] == [True, False]
    assert "needs a terminal" in refused(2, "browse", shared)


# ------------------------------------------------------------------------------------------- init, doctor, SQL


def test_init_makes_a_store_once(tmp_path: Path) -> None:
    first, second = (document("init", tmp_path / "s", "--reserve", "0") for _ in range(2))
    assert (first["made"], second["made"]) == (True, False)
    assert first["store_id"] == second["store_id"]
    assert set(content(tmp_path / "s")) == {"STORE.json", "FORMAT.md"}
    (tmp_path / "file").write_text("x")
    assert refused(1, "init", tmp_path)
    good("init", tmp_path / "r", "--reserve", "1")
    assert (tmp_path / "r" / "reserve.bin").stat().st_size == 1 << 20


def test_init_refuses_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*names: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", broken)
    said = refused(2, "init", tmp_path / "s")
    assert "Operation not permitted" in said
    assert not (tmp_path / "s" / "STORE.json").exists()


def test_doctor_exits_2_when_a_probe_fails(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {row["name"]: row["state"] for row in lines("doctor", own)}
    assert {"create", "exclusive", "move", "fsync", "lock", "clock", "space"} <= set(found)
    assert "failed" not in found.values()
    monkeypatch.setattr(os, "link", lambda *names: None)
    result = call("doctor", own)
    assert result.exit_code == 2
    assert "create\tfailed" in result.stdout


def test_doctor_says_that_a_folder_cannot_be_written(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object, *rest: object, **named: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "mkdir", refuse)
    result = call("doctor", own)
    assert result.exit_code == 2
    assert "folder\tfailed\tPermission denied (EACCES)" in result.stdout


def test_sql_sees_live_rows_and_cannot_write(shared: Path, tmp_path: Path) -> None:
    rows = document("sql", shared, "SELECT episode_id, len(token_ids) AS n, calls[1].turn AS t FROM branches "
                    "WHERE env_id = 'other' ORDER BY ALL")["rows"]
    assert rows == [{"episode_id": "cccc-3", "n": 200, "t": 0}, {"episode_id": "cccc-4", "n": 200, "t": 0}]
    stored = document("sql", shared, "SELECT t_stored, t_stored > '2026-01-01' AS late FROM branches LIMIT 1")["rows"]
    assert (stored[0]["late"], stored[0]["t_stored"][:2]) == (True, "20")
    target = tmp_path / "x.csv"
    assert "DuckDB refuses" in refused(2, "sql", shared, f"COPY branches TO '{target}'")
    assert not target.exists()
    assert "DuckDB refuses" in refused(2, "sql", shared, "SELECT nosuch FROM branches")
    assert "DuckDB refuses" in refused(2, "sql", shared, f"SELECT * FROM read_json('{shared}/STORE.json')")


def test_sql_answers_in_json_whatever_the_types(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    query = ("SELECT 1.25 AS a, DATE '2026-01-31' AS b, TIMESTAMP '2026-01-31 12:00' AS c, 'NaN'::DOUBLE AS d, "
             "[0.5] AS e, '00000000-0000-7000-8000-000000000000'::UUID AS f, INTERVAL 1 DAY AS g, 2 AS a")
    try:
        found = document("sql", shared, query)
        text = good("sql", shared, query).stdout.splitlines()[1].split("\t")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found["rows"] == [{
        "a": 1.25, "b": "2026-01-31", "c": "2026-01-31T12:00:00", "d": None, "e": [0.5],
        "f": "00000000-0000-7000-8000-000000000000", "g": "1 day, 0:00:00", "a_1": 2}]
    assert (found["columns"][-1], text[2], text[-1]) == ("a_1", "2026-01-31 12:00:00", "2")
    assert "the query is empty" in refused(2, "sql", shared, " ")


def test_sql_shows_the_latest_rewards_and_labels(own: Path, tmp_path: Path) -> None:
    store = ReplayStore.open(own)
    store.add_rewards({"aaaa-1": 0.25})
    store.add_labels({"dddd-5": "kept"})
    query = "SELECT episode_id, reward, label FROM branches WHERE reward < 0.4 OR label IS NOT NULL ORDER BY ALL"
    want = [{"episode_id": "aaaa-1", "reward": 0.25, "label": None},
            {"episode_id": "dddd-5", "reward": 0.5, "label": "kept"}]
    assert document("sql", own, query)["rows"] == want
    good("view", own, "--create", tmp_path / "v.db")
    import duckdb

    with duckdb.connect(str(tmp_path / "v.db"), read_only=True) as connection:
        assert connection.execute(query).fetchall() == [tuple(row.values()) for row in want]


def test_sql_keeps_the_criteria_under_a_late_reward() -> None:
    store = example()
    store.add_rewards({"e-0": 0.25})
    query = "SELECT reward, rewards_json FROM branches WHERE episode_id < 'e-2' ORDER BY episode_id"
    rows = [json.loads(row["rewards_json"]) for row in document("sql", store.root, query)["rows"]]
    assert [(row["mean"], row["results"][0]["feedback"]) for row in rows] == [
        (0.25, "the file is not complete"), (0.5, "the file is not complete")]


def test_sql_on_a_damaged_page_is_an_error_that_names_the_store(own: Path) -> None:
    path = max((own / "data").rglob("*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 16
    path.write_bytes(bytes(data))
    said = refused(1, "sql", own, "SELECT * FROM branches")
    assert str(own) in said


def test_sql_without_duckdb_says_how_to_get_it(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentsdpo.replay.cli import query

    monkeypatch.setattr(query, "find_spec", lambda name: None)
    assert "pip install 'agentsdpo[sql]'" in refused(2, "sql", shared, "SELECT 1")


def test_view_makes_a_database_once(shared: Path, tmp_path: Path) -> None:
    import duckdb

    found = document("view", shared, "--create", tmp_path / "s.db")
    assert found["branches"] == 6
    with duckdb.connect(str(tmp_path / "s.db"), read_only=True) as connection:
        assert connection.execute("SELECT count(*), count(DISTINCT episode_id) FROM branches").fetchall() == [(6, 5)]
    assert "exists" in refused(2, "view", shared, "--create", tmp_path / "s.db")
    assert "cannot be made" in refused(2, "view", shared, "--create", tmp_path / "none" / "s.db")


# ------------------------------------------------------------------------------------------ the command itself


def test_the_command_exits_as_it_says(tmp_path: Path) -> None:
    missing = command("stats", tmp_path / "none")
    assert (missing.returncode, missing.stdout) == (4, "")
    assert missing.stderr.startswith("agentsdpo: ")
    assert missing.stderr.count("\n") == 1


def test_a_reader_that_leaves_ends_it_quietly(shared: Path) -> None:
    words = [str(Path(sys.executable).with_name("agentsdpo")), "replay", "show", str(shared), "aaaa"]
    script = f'"{words[0]}" {" ".join(words[1:])} --json | head -c 1; echo " ${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{ 0\n", "")


def test_a_terminal_that_knows_ascii_alone_gets_question_marks(shared: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = command("show", shared, "aaaa", env=env)
    assert done.returncode == 0, done.stderr
    assert "two ?" in done.stdout


def test_help_lists_the_verbs() -> None:
    text = good("--help").stdout
    for verb in ("init", "ls", "show", "stats", "schema", "sql", "view", "tail", "log", "sample", "doctor"):
        assert f"\n  {verb} " in text
