"""``agentsdpo export``: the folder loads elsewhere and answers as the version does."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from agentsdpo.cli import app
from agentsdpo.envs.desk.seed import seed_path
from agentsdpo.errors import ConfigError, ModelError, RegistryError, TokenizerMismatch
from agentsdpo.exporting import export
from agentsdpo.learn.load import load_chat
from agentsdpo.publish.registry import PolicyRegistry


@pytest.fixture(scope="module")
def trained() -> Any:
    """The shipped model after a change to every weight."""
    model = AutoModelForCausalLM.from_pretrained(seed_path())
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.25)
    return model


@pytest.fixture
def registry(tmp_path: Path, trained: Any) -> PolicyRegistry:
    chat = load_chat(seed_path())
    found = PolicyRegistry(tmp_path / "run" / "policies", base_model="seed", tokenizer_sha256=chat.tokenizer_sha256)
    found.publish(AutoModelForCausalLM.from_pretrained(seed_path()).state_dict(), learner_step=0)
    found.publish(trained.state_dict(), learner_step=1)
    return found


def test_the_folder_is_the_version_with_its_tokenizer(registry: PolicyRegistry, tmp_path: Path, trained: Any) -> None:
    out = tmp_path / "deep" / "model"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(out), "--json"])
    assert json.loads(done.stdout) == {"folder": str(out), "version": 1}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in trained.state_dict().items())
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(seed_path()).chat_template
    ids = torch.tensor([tokenizer.encode("Report tax of @tamori for q3-4.")])
    assert torch.equal(model(ids).logits, trained.eval()(ids).logits)
    assert not [path for path in out.parent.iterdir() if path != out]


def test_an_older_version_may_be_named_and_halves_stay_halves(registry: PolicyRegistry, tmp_path: Path) -> None:
    export(registry, 0, tmp_path / "old")
    first = AutoModelForCausalLM.from_pretrained(seed_path()).state_dict()
    assert all(torch.equal(first[name], weight)
               for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "old").state_dict().items())
    registry.publish({name: weight.bfloat16() for name, weight in first.items()}, learner_step=2)
    export(registry, 2, tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_cannot_be_exported_leaves_nothing(registry: PolicyRegistry, tmp_path: Path, tiny_model: Any) -> None:
    out = tmp_path / "model"
    with pytest.raises(RegistryError, match="version 7 is not in .*versions 0 to 1"):
        export(registry, 7, out)
    registry.publish(tiny_model.state_dict(), learner_step=2)
    with pytest.raises(ModelError, match="the weights are not those of a Qwen3ForCausalLM"):
        export(registry, 2, out)
    other = PolicyRegistry(tmp_path / "other", tokenizer_sha256="f" * 64)
    other.publish(tiny_model.state_dict(), learner_step=0)
    with pytest.raises(ConfigError, match="does not say which model"):
        export(other, 0, out)
    with pytest.raises(TokenizerMismatch, match="'ffffffffffff', that of .*seed is"):
        export(other, 0, out, model="seed")
    assert not out.exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="taken is there already"):
        export(registry, 1, tmp_path / "taken")
    assert (tmp_path / "taken" / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_and_a_full_disk_are_named(registry: PolicyRegistry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="file/model cannot be written: .*; give this user write permission there"):
        export(registry, 1, tmp_path / "file" / "model")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RegistryError, match=r"there is no room for .*model \(File too large\); free some space"):
            export(registry, 1, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
