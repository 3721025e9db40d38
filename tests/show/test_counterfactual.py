"""Readings of stored episodes: another hint, none, another policy version; as functions and as verbs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import HintError
from agentsdpo.learn.load import load_chat, load_model
from agentsdpo.plots import tokens
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.show.counterfactual import NONE, OTHER, RIGHT, apart, hint_rows, load_episodes, parts_of, token_rows
from agentsdpo.show.viewing import Scorer, Wanted

RUN = Path(__file__).resolve().parents[2] / "notebooks" / "data" / "demo"
STORE = RUN / "arms" / "robust" / "replay"
EPISODE = "15fbb6ed"


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.set_num_threads(1)
    return Scorer(Wanted("seed"))


@pytest.fixture(scope="module")
def rows(scorer: Scorer) -> list[dict[str, Any]]:
    """Tokens of four stored episodes under the three hints."""
    return hint_rows(load_episodes(RUN, 4)[0], scorer)


def test_every_sampled_token_is_there_once_for_each_hint(rows: list[dict[str, Any]]) -> None:
    hints = tokens.by_hint(rows)
    assert list(hints) == [RIGHT, OTHER, NONE]
    places = [[(row["episode"], row["branch"], row["token"]) for row in own] for own in hints.values()]
    assert places[0] == places[1] == places[2]
    shown = load_episodes(RUN, 4)[0]
    assert len(places[0]) == sum(one.rows[0].branch.n_trainable for one in shown)
    for row, other in zip(hints[RIGHT], hints[OTHER], strict=True):
        assert row["student"] == pytest.approx(other["student"], abs=1e-4)
    assert {row["gap"] for row in hints[NONE]} == {0.0}
    assert {row["weight"] for row in hints[NONE]} == {0.0}


def test_the_hint_is_about_the_values_it_names(rows: list[dict[str, Any]]) -> None:
    own = tokens.by_hint(rows)[RIGHT]
    changed = [row for row in own if row["teacher_best"] != row["text"]]
    assert changed
    assert {row["part"] for row in changed} == {"value"}
    hints = {one.episode.episode_id: one.rows[0].hint for one in load_episodes(RUN, 4)[0]}
    named = [row["teacher_best"] in (hint.words if (hint := hints[row["episode"]]) else "") for row in changed]
    assert np.mean(named) > 0.9
    shares = tokens.part_shares(own)
    assert shares["value"][1] > 0.8 > 0.5 > shares["value"][0]


def test_another_hint_asks_for_other_things(rows: list[dict[str, Any]]) -> None:
    kept = tokens.corrections_kept(tokens.by_hint(rows))
    assert kept[RIGHT].estimate == 1.0
    assert kept[OTHER].estimate < 0.7


def test_hints_that_cannot_be_told_apart_are_refused(scorer: Scorer) -> None:
    one = load_episodes(RUN, 1)[0]
    with pytest.raises(HintError, match="1 of 1 episodes have a hint, 1 different ones; give episodes with hints"):
        hint_rows(one, scorer)


def test_tokens_of_an_unscored_episode_have_their_text_alone() -> None:
    shown = load_episodes(RUN, 1)[0][0]
    found = token_rows(shown, [None])
    assert {row["gap"] for row in found} == {None}
    calls = shown.rows[0].branch.calls
    assert shown.decoder is not None
    ids = shown.rows[0].branch.token_ids
    assert "".join(row["text"] for row in found) == "".join(
        shown.decoder.decode(ids[call.start:call.end].tolist(), skip_special_tokens=False) for call in calls)


def test_parts_of_a_call_with_numbers_and_words() -> None:
    text = ['Let me.', '<tool_call>', '{"name": "', 'add', '", "arguments": {"', 'n', '": ', '12', '}}', '</tool_call>']
    assert parts_of(text) == ["words", "frame", "syntax", "tool", "syntax", "argument", "syntax", "value", "syntax",
                              "frame"]
    assert parts_of(["é", "", "x"]) == ["words", "words", "words"]


def test_parts_of_calls_in_every_form() -> None:
    json = ['{"name": "', "f", '", "parameters": {"', "a", '": "', "v", '"}}']
    marks = ["syntax", "tool", "syntax", "argument", "syntax", "value", "syntax"]
    assert parts_of(json) == marks
    assert parts_of(["<|python_tag|>", *json]) == ["frame", *marks]
    assert parts_of(["<think>", "so", "</think>", "\n", *json]) == ["frame", "words", "frame", "words", *marks]
    bare = ["<tool_call>", "<function=", "f", "><parameter=", "a", ">\n", '{"name": "', "bob", '", "b": ', "3}",
            "\n</parameter></function>"]
    assert parts_of(bare) == ["frame", "syntax", "tool", "syntax", "argument", "syntax", *["value"] * 4, "syntax"]


def test_a_turn_of_openings_alone_is_marked_in_linear_time() -> None:
    marks = parts_of(["<tool_call>", "<function=f>", *["<parameter=", "a", ">"] * 20_000])
    assert marks[:5] == ["frame", "syntax", "syntax", "argument", "syntax"]


def test_apart_orders_by_size() -> None:
    row = {"branch": 0, "turn": 1, "token": 7, "text": "usd", "teacher_best": "m_usd", "teacher": -1.0}
    small = {**row, "token": 8, "teacher": -0.1}
    after = [{**row, "teacher_best": "eur", "teacher": -5.0}, {**small, "teacher_best": "eur", "teacher": -0.2}]
    found = apart([small, row], after)
    assert [(one["token"], one["before"], one["after"], round(one["change"], 2)) for one in found] == [
        (7, "m_usd", "eur", -4.0), (8, "m_usd", "eur", -0.1)]
    assert apart([row], [row]) == []


# ------------------------------------------------------------------------------------------------------------- verbs


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "agentsdpo.cli", "replay", *words], text=True, capture_output=True,
                          timeout=180, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_rescore(tmp_path: Path) -> None:
    hint = "For revenue work use the audit sheet; unit eur; file in archive; notify cfo."
    done = run("rescore", str(STORE), EPISODE, "--hint", hint, "--json", "-o", str(tmp_path / "deep" / "e.html"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["reading"] for one in found["readings"]] == ["the recorded hint", "this hint", "no hint"]
    assert found["readings"][2]["gap_size"] == 0
    assert {"audit", "archive", "cfo", "eur"} <= {one["after"] for one in found["tokens"]}
    assert {"bank", "reports", "partner", "m_usd"} <= {one["before"] for one in found["tokens"]}
    assert "audit sheet" in (tmp_path / "deep" / "e.html").read_text()
    said = run("rescore", str(STORE), EPISODE, "--hint", hint).stdout
    assert "likeliest with the recorded hint" in said
    assert "agent · turn 0" in said


def test_broken_settings_beside_a_store_are_named(tmp_path: Path) -> None:
    shutil.copytree(STORE, tmp_path / "run" / "replay")
    (tmp_path / "run" / "config.toml").write_text("model = ")
    refused = run("rescore", str(tmp_path / "run" / "replay"), EPISODE, "--hint", "x")
    assert (refused.returncode, "config.toml is not TOML" in refused.stderr) == (2, True), refused.stderr


@pytest.mark.slow
def test_diff_between_policy_versions(tmp_path: Path) -> None:
    shutil.copytree(STORE, tmp_path / "run" / "replay")
    model = load_model(seed_path(), load_chat(seed_path()))
    registry = PolicyRegistry(tmp_path / "run" / "policies")
    registry.publish(model.state_dict(), learner_step=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    registry.publish(model.state_dict(), learner_step=1)
    store = str(tmp_path / "run" / "replay")
    done = run("diff", store, EPISODE, "--from", "v0", "--to", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["from"], found["to"]) == (0, 1)
    assert len(found["differences"]) > 20
    assert run("diff", store, EPISODE, "--from", "v1", "--to", "v1").stdout.endswith(
        "no token's likeliest word is another one\n")
    for words, told, code in ((("--from", "v0", "--to", "v9"), "policy version 9 is not in", 1),
                              (("--from", "v0"), "--to is missing; name both policy versions", 2),
                              (("--from", "a", "--to", "v1"), "--from is 'a'", 2),
                              (("--model", "seed"), "stores are compared without a model", 2)):
        refused = run("diff", store, EPISODE, *words)
        assert (refused.returncode, told in refused.stderr) == (code, True), refused.stderr
    same = json.loads(run("diff", store, str(STORE), "--json").stdout)
    assert same["counts"]["same"] == 64
