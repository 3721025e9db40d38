"""``agentsdpo doctor`` against servers that are wrong in one way each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FakeVllm, edit
from typer.testing import CliRunner

from agentsdpo import doctor
from agentsdpo.cli import app
from agentsdpo.envs.desk.seed import seed_path


def looked_at(fake: FakeVllm, tmp_path: Path, **more: Any) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.examine(fake.url, str(seed_path()), store=str(tmp_path), **more)}


class Other:
    """A chat format whose text is tokenised another way."""

    def __init__(self, chat: Any) -> None:
        self.chat, self.tokenizer = chat, chat.tokenizer

    def encode(self, text: str) -> list[int]:
        return self.chat.encode(text.replace("漢", "?"))


def test_a_server_without_this_model_has_its_parity_found(fake_vllm: FakeVllm, chat: Any, tmp_path: Path) -> None:
    fake_vllm.chat = chat
    found = looked_at(fake_vllm, tmp_path)
    assert {name for name, check in found.items() if check.state == "bad"} == {"parity"}  # it is no model at all
    assert "nats in the mean" in found["parity"].what
    assert found["weight_update"].state == "skipped"
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(("wrong", "name", "word"), [
    (lambda fake: setattr(fake, "mode", "raw_logprobs"), "logprobs", "--logprobs-mode processed_logprobs"),
    (lambda fake: setattr(fake, "generate", False), "token_ids", "--enable-scale-out"),
    (lambda fake: setattr(fake, "label", "default"), "versions", "agentsdpo serve"),
    (lambda fake: setattr(fake, "chat", Other(fake.chat)), "tokenizer", "whose tokenizer the learner has"),
    (lambda fake: fake.plan.append(edit(lambda c: c.update(token_ids=None))), "token_ids", "no_token_ids"),
    (lambda fake: fake.plan.append(edit(lambda c: c.update(logprobs=None))), "token_ids", "no_logprobs")])
def test_each_finding_comes_with_its_fix(fake_vllm: FakeVllm, chat: Any, tmp_path: Path,
                                         wrong: Callable[[FakeVllm], None], name: str, word: str) -> None:
    fake_vllm.chat = chat
    wrong(fake_vllm)
    check = looked_at(fake_vllm, tmp_path)[name]
    assert check.state == "bad"
    assert word in check.line()


def test_another_template_is_found(fake_vllm: FakeVllm, chat: Any, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.chat = chat
    monkeypatch.setattr("fake_vllm.tokenized", lambda own, body: own.encode(body.get("prompt", "another template")))
    found = looked_at(fake_vllm, tmp_path)
    assert found["tokenizer"].state == "ok"
    assert found["template"].state == "bad"
    assert "--chat-template" in found["template"].fix


def test_the_disk_is_looked_at(fake_vllm: FakeVllm, chat: Any, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vllm.chat = chat
    monkeypatch.setattr(doctor, "_fsync_s", lambda folder: 0.5)
    assert "an fsync in" in looked_at(fake_vllm, tmp_path)["disk"].what
    monkeypatch.setattr(doctor, "LITTLE_BYTES", 2**60)
    assert "are free in" in looked_at(fake_vllm, tmp_path / "not" / "yet")["disk"].what


def test_a_server_that_is_away_is_not_sent_to_the_doctor(fake_vllm: FakeVllm, tmp_path: Path) -> None:
    fake_vllm.close()
    found = next(iter(doctor.examine(fake_vllm.url, str(seed_path()), store=str(tmp_path))))
    assert "cannot be reached" in found.what
    assert found.fix == "start it with agentsdpo serve, or look into its log"


def test_the_verb_says_it_in_words_or_json_and_by_its_exit_code(tmp_path: Path) -> None:
    with FakeVllm() as fake:
        pass
    run = CliRunner().invoke(app, ["doctor", fake.url, "--model", "seed", "--store", str(tmp_path)])
    assert run.exit_code == 1
    assert run.stdout.startswith("bad      reachable")
    assert "skipped  tokenizer" in run.stdout
    run = CliRunner().invoke(app, ["doctor", fake.url, "--model", "seed", "--store", str(tmp_path), "--json"])
    assert run.exit_code == 1
    assert {row["name"]: row["state"] for row in json.loads(run.stdout)}["reachable"] == "bad"
