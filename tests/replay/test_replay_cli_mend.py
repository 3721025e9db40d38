"""verify, recover, compact; import, export, publish."""

import json
import shlex
from glob import glob
from pathlib import Path

import pytest
from replay_factories import make_episode
from replay_shown import build, spoken
from test_replay_cli import call, content, document, good, lines, refused

from agentsdpo.replay import ReplayStore


def flip(path: Path, share: int = 8) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // share] ^= 16
    path.write_bytes(bytes(data))


def hashes(root: Path) -> dict[object, str]:
    return {key: row.content_sha256 for key, row in ReplayStore.open(root, create=False).snapshot().rows.items()}


# ------------------------------------------------------------------------------------------- verify and recover


@pytest.mark.parametrize("level", ["fast", "full", "deep"])
def test_verify_finds_nothing_in_a_whole_store(level: str, own: Path) -> None:
    found = document("verify", own, "--level", level)
    assert (found["ok"], found["problems"], found["rows"]) == (True, [], 6)
    assert set(found) == {"schema", "store", "level", "problems", "entries", "files", "rows", "bytes", "orphans",
                          "quarantined", "saved", "lost", "ok"}
    assert "no damage" in good("verify", own, "--level", level).stderr


def test_verify_exits_3_and_names_the_file(own: Path) -> None:
    path = max((own / "data").rglob("*.parquet"))
    flip(path)
    result = call("verify", own)
    assert result.exit_code == 3
    assert path.name in result.stdout
    assert call("verify", own, "-q").stderr == ""
    assert json.loads(call("verify", own, "--json").stdout)["ok"] is False
    good("verify", own, "--level", "fast")
    assert "no level" in refused(2, "verify", own, "--level", "thorough")


def test_verify_exits_3_when_the_store_cannot_say_what_it_is(own: Path) -> None:
    (own / "STORE.json").write_bytes(b"{")
    assert "STORE.json is damaged" in refused(3, "verify", own)


def test_quarantine_changes_nothing_without_yes(own: Path) -> None:
    path = max((own / "data").rglob("*.parquet"))
    flip(path)
    before = content(own)
    result = call("verify", own, "--quarantine")
    assert result.exit_code == 3
    assert "--yes" in result.stderr
    assert content(own) == before
    done = call("verify", own, "--quarantine", "--yes")
    assert done.exit_code == 3
    left = len(hashes(own))
    assert f"branches of these were saved, {6 - left} are lost" in done.stderr
    assert "restore it" not in done.stdout, "what was done needs no doing"
    assert not path.exists()
    good("verify", own)
    assert 0 < len(hashes(own)) < 6


def test_readers_of_a_damaged_store_name_the_remedy(own: Path, tmp_path: Path) -> None:
    path = max((own / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:2000])
    for words in (("ls", own), ("stats", own), ("sql", own, "SELECT 1"), ("export", own, "openai", tmp_path / "x")):
        shown = " ".join(call(*words).stderr.split())
        assert "has 2000 bytes" in shown
        assert f"agentsdpo replay verify {own} --quarantine --yes" in shown, words
    call("verify", own, "--quarantine", "--yes")
    good("ls", own)


def test_recover_settles_an_orphan_once(own: Path) -> None:
    path = next((own / "data").rglob("*.parquet"))
    orphan = path.with_name(path.name[:37] + "0" * 8 + path.name[45:])
    orphan.write_bytes(path.read_bytes())
    before = content(own)
    assert [each["what"] for each in document("recover", own)["found"]] == ["lost"]
    assert "--yes" in good("recover", own).stderr
    assert content(own) == before
    assert document("recover", own, "--yes")["changed"] == 1
    assert not orphan.exists()
    assert document("recover", own, "--yes")["changed"] == 0
    assert len(hashes(own)) == 6


def test_compact_keeps_every_row(own: Path) -> None:
    before, rows = content(own), hashes(own)
    assert "would rewrite 3 files" in good("compact", own).stdout
    assert content(own) == before
    found = document("compact", own, "--yes")
    assert (len(found["inputs"]), len(found["outputs"]), found["dry_run"]) == (3, 1, False)
    assert hashes(own) == rows
    good("verify", own, "--level", "deep")
    assert len(lines("log", own)) > 5
    fork = own.parent / "fork"
    good("fork", own, fork)
    assert hashes(fork) == rows
    good("verify", fork, "--level", "deep")
    assert "--target-size is 'big'" in refused(2, "compact", own, "--target-size", "big")


# ---------------------------------------------------------------------------------------- import, export, publish


def test_export_and_import_bring_the_tokens_back(own: Path, tmp_path: Path) -> None:
    for fmt in ("atif", "parquet"):
        made = document("export", own, fmt, tmp_path / f"out.{fmt}")
        assert made["episodes"] == 5
        good("init", tmp_path / fmt, "--reserve", "0")
        found = document("import", tmp_path / fmt, fmt, tmp_path / f"out.{fmt}")
        assert (found["added"], found["trainable"]) == (5, document("stats", own)["trainable"])
        assert sorted(hashes(tmp_path / fmt).values()) == sorted(hashes(own).values())
        assert document("import", tmp_path / fmt, fmt, tmp_path / f"out.{fmt}")["duplicates"] == 5


def test_export_chooses_and_counts(own: Path, tmp_path: Path) -> None:
    found = document("export", own, "hf", tmp_path / "chats.jsonl", "--where", "env_id == 'desk'", "--limit", "1")
    assert (found["episodes"], found["records"]) == (1, 1)
    row = json.loads((tmp_path / "chats.jsonl").read_text())
    assert row["messages"][0]["role"] == "user"
    assert "no export format" in refused(2, "export", own, "nosuch", tmp_path / "x")
    assert "no import format" in refused(2, "import", own, "pairs", tmp_path / "chats.jsonl")


def test_strict_import_refuses_loss(own: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages, "mood": "good"}) + "\n")
    before = content(own)
    assert "would lose" in refused(1, "import", own, "openai", tmp_path / "in.jsonl", "--strict", "--train-allowed")
    assert content(own) == before
    found = good("import", own, "openai", tmp_path / "in.jsonl", "--train-allowed").stdout
    assert "lost: " in found
    assert "mood" in found


def test_what_is_made_public_must_be_looked_through(own: Path, tmp_path: Path) -> None:
    for words in (("publish", own, tmp_path / "d"), ("export", own, "sts", tmp_path / "d")):
        said = refused(2, *words)
        assert "--redact" in said
        assert "--i-have-checked" in said
    assert not (tmp_path / "d").exists()
    good("export", own, "sts", tmp_path / "t.jsonl", "--i-have-checked")
    assert "would be ignored" in refused(2, "export", own, "hf", tmp_path / "x", "--redact-rules", tmp_path / "r")
    assert "cannot be read" in refused(2, "export", own, "hf", tmp_path / "x", "--redact", "--redact-rules",
                                       tmp_path / "r")
    assert "tokens=" in refused(2, "export", own, "hf", tmp_path / "x", "--redact", "--redact-tokens", "paint")


def test_planted_secrets_do_not_leave(tmp_path: Path) -> None:
    secret = "sk-" + "a1B2" * 10
    store = ReplayStore.open(tmp_path / "s")
    store.append([spoken("leak", messages=({"role": "user", "content": f"use {secret}"},))])
    found = document("publish", tmp_path / "s", tmp_path / "d", "--redact")
    assert found["redacted"]["openai_key"] >= 1
    assert not any(secret.encode() in data for data in content(tmp_path / "d").values())


def test_publish_makes_a_folder_that_datasets_reads(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = document("publish", own, tmp_path / "d", "--redact", "--title", 'The "desk"', "--license", "apache-2.0")
    assert (found["episodes"], found["records"]) == (5, 6)
    assert set(content(tmp_path / "d")) == {"README.md", "data/train-00000-of-00001.parquet"}
    card = (tmp_path / "d" / "README.md").read_text()
    assert card.startswith('---\npretty_name: "The \\"desk\\""\nlicense: apache-2.0\n')
    assert "is not an empty folder" in refused(1, "publish", own, tmp_path / "d", "--redact")
    assert "no dataset format" in refused(2, "publish", own, tmp_path / "e", "--redact", "--format", "delta")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(tmp_path / "d"), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(set(rows["env_id"])) == ["desk", "other"]
    assert len(rows) == 6
    assert {len(row["token_ids"]) for row in rows if row["env_id"] == "other"} == {0}, "nobody can read these tokens"


def test_recover_and_compact_say_what_they_found_in_a_busy_store(own: Path) -> None:
    store = ReplayStore.open(own)
    store.append([make_episode(60)])
    found = document("recover", own)["found"]
    assert [each["what"] for each in found] == ["open"]
    store.close()
    assert document("recover", own)["found"] == []


# ------------------------------------------------------------------------------------------------ the docs page


def test_every_command_of_the_docs_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page, in one folder: later commands see what earlier ones did."""
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    blocks = page.split("```sh\n")[1:]
    commands = [line for block in blocks for line in block.split("```")[0].splitlines()]
    assert len(commands) > 30
    build(tmp_path / "run" / "replay")
    (tmp_path / "rewards.jsonl").write_text('{"episode_id": "aaaa-1", "reward": 0.5}\n')
    monkeypatch.chdir(tmp_path)
    for line in commands:
        words = [word.replace("E", "aaaa") if word == "E" else word for word in shlex.split(line)]
        assert words[:2] == ["agentsdpo", "replay"], line
        result = call(*(name for word in words[2:] for name in sorted(glob(word)) or [word]))
        assert result.exit_code == 0, f"{line}: {result.stderr}"
    assert (tmp_path / "run" / "dataset" / "README.md").exists()


def test_the_docs_page_names_every_verb() -> None:
    page = (Path(__file__).parents[2] / "docs" / "replay.md").read_text()
    help_text = good("--help").stdout
    verbs = [line.split()[0] for line in help_text.partition("Commands:")[2].splitlines() if line.startswith("  ")
             and not line.startswith("   ")]
    assert len(verbs) >= 30
    missing = [verb for verb in verbs if f"agentsdpo replay {verb}" not in page and f"`{verb}`" not in page]
    assert missing == []
