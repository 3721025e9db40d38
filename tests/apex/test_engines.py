"""Every engine plays: a model at a provider, one behind the interface of vLLM, one in this process; judges too."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.benchmarks.apex.agents import make_agent
from agentsdpo.benchmarks.apex.config import BenchConfig, load
from agentsdpo.benchmarks.apex.desk import DeskTasks
from agentsdpo.benchmarks.apex.start import reopen, start
from agentsdpo.benchmarks.apex.summary import summarise
from agentsdpo.errors import ConfigError, ModelError, RunError

sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))  # the fake server is theirs

DESK = {"suite": "desk-mini", "tasks": 2, "attempts": 1}


def hosted(server: Any, **more: Any) -> dict[str, Any]:
    return {**DESK, "hosted": {"model": "openai/m", "api_base": server.url, "retries": 0, "backoff_s": 0.0,
                               "usd_per_mtok_in": 1.0, "usd_per_mtok_out": 1.0, **more}}


def test_a_hosted_model_plays_and_its_money_is_counted(chat_server: Any, tmp_path: Path) -> None:
    calls = [{"id": "c0", "type": "function", "function": {"name": "mail_list", "arguments": "{}"}}]
    chat_server.answer = lambda body: chat_server.say(calls=calls) if body["messages"][-1]["role"] == "user" \
        else chat_server.say("done")
    bench = start(load(None, hosted(chat_server)), tmp_path / "r")
    records = bench.play()
    assert [(record.outcome, record.turns, record.tool_calls, record.passed) for record in records] == [
        ("completed", 2, 1, False)] * 2
    assert {(record.prompt_tokens, record.completion_tokens) for record in records} == {(18, 6)}
    assert records[0].cost_usd == pytest.approx(24e-6)
    assert bench.about["agent"]["engine"] == "litellm"
    assert "hidden-key" not in json.dumps(bench.about)


def test_a_provider_that_is_down_leaves_attempts_unscored_and_resume_scores_them(chat_server: Any,
                                                                                tmp_path: Path) -> None:
    chat_server.answer = lambda body: (500, "down", {})
    bench = start(load(None, {**hosted(chat_server), "retries": 0}), tmp_path / "r")
    assert {(record.outcome, record.scored) for record in bench.play()} == {("provider_error", False)}
    chat_server.answer = lambda body: chat_server.say("an answer")
    assert {(record.outcome, record.scored) for record in reopen(tmp_path / "r").play()} == {("completed", True)}


def test_money_that_is_spent_stops_the_run_where_it_is(chat_server: Any, tmp_path: Path) -> None:
    chat_server.answer = lambda body: chat_server.say("an answer", tokens=(900_000, 0))
    bench = start(load(None, {**hosted(chat_server, max_cost_usd=0.5), "concurrency": 1}), tmp_path / "r")
    with pytest.raises(ConfigError):
        bench.play()
    assert sum(record.scored for record in bench.folder.records()) == 1


def test_a_served_model_plays_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = pytest.importorskip("fake_vllm").FakeVllm()
    with fake:
        bench = start(load(None, {**DESK, "model": "seed", "url": fake.url}), tmp_path / "r")
        records = bench.play()
    assert {record.scored for record in records} == {True}
    assert {record.branches for record in records} == {1}
    assert bench.about["agent"]["served"] == "policy"


def test_another_model_cannot_finish_a_run(tmp_path: Path) -> None:
    """Its attempts would be reported as the first one's."""
    fake_vllm = pytest.importorskip("fake_vllm")
    with fake_vllm.FakeVllm() as fake:
        bench = start(load(None, {**DESK, "model": "seed", "url": fake.url}), tmp_path / "r")
        assert reopen(tmp_path / "r").agent.stamp == bench.agent.stamp
    with fake_vllm.FakeVllm() as fake:
        fake.models = ["other"]
        with pytest.raises(RunError, match="served 'policy', now it would be played by one with 'other'"):
            reopen(tmp_path / "r", {"url": fake.url})


def test_a_judged_task_file_is_graded_by_the_judge_and_again_by_another(chat_server: Any, tmp_path: Path) -> None:
    from agentsdpo.benchmarks.apex.grading import regrade
    from agentsdpo.collect.hosted import HostedConfig

    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"id": "t0", "prompt": "Say five.", "rubric": [
        {"id": "five", "text": "The answer states that the number is five."}]}) + "\n")
    verdicts = {"yes": True, "no": False}

    def judge(body: Any) -> Any:
        said = json.loads(body["messages"][-1]["content"].splitlines()[0])
        canary = said["criterion_id"] != "five"
        return chat_server.say(json.dumps({"criterion_id": said["criterion_id"], "rationale": "r", "is_criteria_true":
                                           not canary and verdicts[body["model"]]}))

    chat_server.answer = judge
    model = {"api_base": chat_server.url, "retries": 0, "backoff_s": 0.0}
    settings = {"suite": str(path), "attempts": 1, "judge": {"model": "openai/yes", **model}}
    assert [r.passed for r in start(load(None, {**settings, "model": "opener"}), tmp_path / "o").play()] == [False]
    assert not chat_server.seen, "an opening alone reaches no judge"
    bench = start(load(None, {**settings, "model": "inject"}), tmp_path / "r")
    (record,) = bench.play()
    assert (record.passed, record.judge_tokens) == (True, 24), "two questions"
    assert summarise(bench.folder)["totals"]["judge_tokens"] == 24
    assert bench.about["judge"]["model"] == "openai/yes"
    assert bench.about["judge"]["prompt_sha256"]
    assert regrade(tmp_path / "r", HostedConfig(model="openai/no", **model))[0].passed is False
    assert bench.folder.grading()["judge"]["model"] == "openai/no"


@pytest.mark.parametrize(("model", "url", "engine"), [
    ("oracle", "", "script"), ("seed", "", "inprocess"), ("openai/gpt-5", "", "litellm")])
def test_the_name_says_which_engine_answers(model: str, url: str, engine: str) -> None:
    assert make_agent(BenchConfig(model=model, url=url), DeskTasks(count=1)).engine == engine


def test_a_model_that_is_not_there_says_so() -> None:
    with pytest.raises(ModelError, match="no model folder"):
        make_agent(BenchConfig(model="./nowhere"), DeskTasks(count=1))
