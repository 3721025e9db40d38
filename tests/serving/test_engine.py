"""The vLLM engine against a fake server that replays every known way of going wrong."""

import asyncio
import math
import threading
import time
from typing import Any

import pytest
from fake_vllm import EOS, VOCAB, FakeVllm, abort, distribution, drop, edit, half, says, slow, status

from agentsdpo.collect.branch import untrainable
from agentsdpo.collect.engine import Engine
from agentsdpo.collect.vllm import VllmEngine
from agentsdpo.errors import ConfigError, EngineError
from agentsdpo.types import Completion, Sampling

PROMPT = [3, 4, 5]


def ask(engine: VllmEngine, prompt: list[int] | None = None, **sampling: Any) -> Completion:
    return asyncio.run(engine.complete(prompt or PROMPT, Sampling(**sampling), session="e/0"))


def engine_of(fake: FakeVllm, **more: Any) -> VllmEngine:
    return VllmEngine(fake.url, **{"eos_ids": (EOS,), "vocab_size": VOCAB, "patience_s": 8.0, **more})


def test_a_good_answer_is_recorded_exactly(fake_vllm: FakeVllm) -> None:
    fake_vllm.label = "41"
    engine = engine_of(fake_vllm)
    assert isinstance(engine, Engine)
    assert (engine.context_window, engine.version, engine.records_kept) == (128, 41, False)
    done = ask(engine, temperature=0.5)
    table, _ = distribution(0.5, 0, "processed_logprobs")
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == EOS
    assert done.logprobs == tuple(table[i] for i in done.token_ids)
    assert [(s.version, s.start, s.end) for s in done.versions] == [(41, 0, 3)]
    assert untrainable(done, Sampling(temperature=0.5)) is None
    (sent,) = fake_vllm.sampled()
    assert sent["token_ids"] == PROMPT
    assert sent["cache_salt"] == "v41"
    drawing = sent["sampling_params"]
    assert drawing["stop_token_ids"] == [EOS]
    assert {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"} <= drawing.keys()
    assert "seed" not in drawing  # one seed ends a server on CPUs in the middle of a chunked prompt


def test_every_request_has_an_id_of_its_own_and_sessions_are_exclusive(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm)
    fake_vllm.plan += [slow(0.3)]

    async def run() -> None:
        first = asyncio.create_task(engine.complete(PROMPT, Sampling(), session="a"))
        await asyncio.sleep(0.1)
        with pytest.raises(EngineError, match="already has a call in flight"):
            await engine.complete(PROMPT, Sampling(), session="a")
        await engine.complete(PROMPT, Sampling(), session="b")
        await first
        await engine.complete(PROMPT, Sampling(), session="a")

    asyncio.run(run())
    ids = [body["request_id"] for body in fake_vllm.sampled()]
    assert len(set(ids)) == len(ids) == 3


def test_prompts_that_do_not_fit_are_refused_here(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm)
    with pytest.raises(EngineError, match="128 tokens leaves no room in a window of 128"):
        ask(engine, [1] * 128)
    assert not fake_vllm.sampled()
    assert len(ask(engine, [1] * 126, max_tokens=50).token_ids) == 2


@pytest.mark.parametrize(("fault", "tries"), [
    (status(429, retry_after="0"), 2), (status(500), 2), (status(503), 2), (drop, 2), (half, 2),
    (says(b"<html>bad gateway"), 2), (abort(0), 2)])
def test_faults_that_pass_are_sent_again_and_nothing_of_them_is_used(fake_vllm: FakeVllm, fault: Any,
                                                                      tries: int) -> None:
    engine = engine_of(fake_vllm)
    good = ask(engine)
    fake_vllm.requests.clear()
    fake_vllm.plan += [fault]
    again = ask(engine)
    assert again.model_copy(update={"working_s": None}) == good.model_copy(update={"working_s": None})
    assert len(fake_vllm.sampled()) == tries
    assert len({body["request_id"] for body in fake_vllm.sampled()}) == tries
    assert engine.attempts_failed == tries - 1


def test_a_server_that_is_too_slow_is_given_up_in_time(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm, timeout_s=0.2, patience_s=0.5)
    fake_vllm.plan += [slow(0.6)] * 20
    with pytest.raises(EngineError, match=r"gave no answer within 0.2 s; raise the engine's timeout_s"):
        ask(engine)


@pytest.mark.parametrize(("code", "fix"), [(400, "agentsdpo doctor"), (401, "VLLM_API_KEY"), (404, "served"),
                                           (413, "shorter prompt"), (422, "log")])
def test_what_a_server_refuses_is_not_sent_again(fake_vllm: FakeVllm, code: int, fix: str) -> None:
    engine = engine_of(fake_vllm)
    fake_vllm.plan += [status(code)]
    with pytest.raises(EngineError, match=f"answered {code}: no; .*{fix}"):
        ask(engine)
    assert len(fake_vllm.sampled()) == 1


def cut_logprobs(choice: Any) -> None:
    del choice["logprobs"]["content"][-1]


def doubled_logprob(choice: Any) -> None:
    choice["logprobs"]["content"].append(choice["logprobs"]["content"][-1])


def shifted(choice: Any) -> None:
    content = choice["logprobs"]["content"]
    choice["logprobs"]["content"] = [{**content[-1], "token_id": 9}, *content[:-1]]


def sentinel(choice: Any) -> None:
    choice["logprobs"]["content"][1]["logprob"] = -9999.0


def null_number(choice: Any) -> None:
    choice["logprobs"]["content"][1]["logprob"] = None


@pytest.mark.parametrize(("change", "reason"), [
    (lambda c: c.update(token_ids=None), "no_token_ids"), (lambda c: c.pop("token_ids"), "no_token_ids"),
    (lambda c: c["token_ids"].append(3), "length_mismatch"), (cut_logprobs, "length_mismatch"),
    (doubled_logprob, "length_mismatch"), (shifted, "logprobs_misaligned"), (sentinel, "logprob_sentinel"),
    (null_number, "logprob_sentinel"), (lambda c: c.update(logprobs=None), "no_logprobs"),
    (lambda c: c.update(weight_versions=None), "version_unknown"),
    (lambda c: c.update(weight_versions=[{"version": "0", "start": 0, "end": 2}]), "version_unknown"),
    (lambda c: c.update(weight_versions=[{"version": "0", "start": 1, "end": 3}]), "version_unknown"),
    (lambda c: c.update(weight_versions=[{"version": "default", "start": 0, "end": 3}]), "version_unknown"),
    (lambda c: c.update(weight_versions=["?"]), "version_unknown")])
def test_what_cannot_be_trusted_is_kept_with_its_reason(fake_vllm: FakeVllm, change: Any, reason: str) -> None:
    engine = engine_of(fake_vllm)
    ids = ask(engine).token_ids
    fake_vllm.plan += [edit(change)]
    done = ask(engine)
    assert done.token_ids[:3] == ids
    assert untrainable(done, Sampling()) == reason
    assert untrainable(ask(engine), Sampling()) is None  # the next answer is good


def test_text_without_any_ids_is_no_record(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm)
    fake_vllm.plan += [edit(lambda c: c.update(token_ids=None, logprobs=None))]
    with pytest.raises(EngineError, match="text cannot be turned back into what was sampled"):
        ask(engine)
    fake_vllm.plan += [edit(lambda c: c.update(token_ids=[3, VOCAB, 2]))]
    with pytest.raises(EngineError, match=f"answered with id {VOCAB}, the vocabulary has {VOCAB} ids"):
        ask(engine)
    fake_vllm.plan += [says(b'{"choices": []}')]
    with pytest.raises(EngineError, match="is no completion"):
        ask(engine)


def test_a_version_that_changes_in_the_middle_is_two_spans(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm)
    two = [{"version": "0", "start": 0, "end": 2}, {"version": "1", "start": 2, "end": 3}]
    fake_vllm.plan += [edit(lambda c: c.update(weight_versions=two))]
    done = ask(engine)
    assert [(s.version, s.start, s.end) for s in done.versions] == [(0, 0, 2), (1, 2, 3)]
    assert engine.version == 1
    fake_vllm.requests.clear()
    ask(engine)
    assert fake_vllm.sampled()[0]["cache_salt"] == "v1"


def test_an_aborted_call_goes_on_where_it_was_cut(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm)
    fake_vllm.length = 4
    fake_vllm.plan += [abort(1)]
    done = ask(engine, max_tokens=5)
    first, second = fake_vllm.sampled()
    assert second["token_ids"] == [*PROMPT, done.token_ids[0]]
    assert second["sampling_params"]["max_tokens"] == 4
    assert first["request_id"] != second["request_id"]
    assert len(done.token_ids) == len(done.logprobs) == 5
    assert [(s.version, s.start, s.end) for s in done.versions] == [(0, 0, 5)]
    assert done.finish_reason == "stop"


def test_a_server_that_dies_is_waited_for_and_asked_again_what_it_is(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm, patience_s=30.0)
    fake_vllm.plan += [slow(60.0)]
    done: list[Completion] = []
    caller = threading.Thread(target=lambda: done.append(ask(engine)))
    caller.start()
    while not fake_vllm.sampled():
        time.sleep(0.01)
    fake_vllm.close()  # killed in the middle of a generation
    time.sleep(0.3)
    with FakeVllm(port=fake_vllm.port, mode="raw_logprobs", label="7"):  # somebody starts another one there
        caller.join(30)
    assert done[0].versions[0].version == 7
    assert done[0].logprob_kind == "raw"
    assert untrainable(done[0], Sampling()) == "kind_raw"
    assert engine.version == 7


def test_a_server_that_stays_away_costs_the_call_not_the_engine(fake_vllm: FakeVllm) -> None:
    engine = engine_of(fake_vllm, patience_s=0.5)
    fake_vllm.close()
    with pytest.raises(EngineError, match=r"cannot be reached: .*agentsdpo doctor"):
        ask(engine)
    with FakeVllm(port=fake_vllm.port):
        assert ask(engine).finish_reason == "stop"


def test_an_answer_beyond_all_measure_is_not_read_to_its_end(fake_vllm: FakeVllm,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentsdpo.collect.vllm.retry.MAX_ANSWER", 2**20)
    engine = engine_of(fake_vllm)
    fake_vllm.plan += [says(b"[" + b"1," * 2**20 + b"1]")]
    with pytest.raises(EngineError, match="answered with more than 1 MiB"):
        ask(engine)


# -------------------------------------------------------------------------------------------- kinds, kept sets, routes


@pytest.mark.parametrize(("mode", "dev", "kind"), [
    ("processed_logprobs", True, "processed"), ("raw_logprobs", True, "raw"), ("processed_logits", True, "unknown"),
    ("processed_logprobs", False, "processed"), ("raw_logprobs", False, "raw"), ("tempered", False, "tempered")])
def test_the_kind_of_log_prob_is_asked_or_found_out(mode: str, dev: bool, kind: str) -> None:
    with FakeVllm(mode=mode, dev=dev) as fake:
        engine = engine_of(fake, version=3)
        assert engine.facts.kind == kind
        assert ask(engine, temperature=0.7).logprob_kind == kind
        assert ask(engine, temperature=0.0).logprob_kind == "raw"


def test_truncated_sampling_comes_with_its_kept_set(fake_vllm: FakeVllm) -> None:
    with FakeVllm(kept_sets=True) as fake:
        engine = engine_of(fake)
        assert engine.records_kept
        done = ask(engine, top_k=4)
        kept = (0, 1, 2, 3)
        assert done.kept == (kept,) * 3
        assert untrainable(done, Sampling(top_k=4)) is None
        assert math.isclose(sum(math.exp(distribution(1.0, 4, fake.mode)[0][i]) for i in kept), 1.0)
        for change, reason in [
                (lambda c: c.update(sampling_mask=None), "kept_set_missing"),
                (lambda c: c.update(sampling_mask=[[1]]), "kept_set_missing"),
                (lambda c: c.update(sampling_mask=[[9, 10]] * 3), "token_outside_kept_set"),
                (lambda c: c.update(sampling_mask=[[i] for i in c["token_ids"]]), "kept_set_mismatch")]:
            fake.plan += [edit(change)]
            assert untrainable(ask(engine, top_k=4), Sampling(top_k=4)) == reason
        assert untrainable(ask(engine, top_p=0.5), Sampling(top_p=0.5)) == "kept_set_missing"  # vLLM: needs top_k
    assert not engine_of(fake_vllm).records_kept


def test_without_the_token_endpoint_completions_do() -> None:
    with FakeVllm(generate=False, label="5") as fake:
        engine = engine_of(fake)
        assert engine.facts.route == "/v1/completions"
        done = ask(engine)
        assert fake.sampled()[0]["prompt"] == PROMPT
        assert [(s.version, s.end) for s in done.versions] == [(5, 3)]
        assert untrainable(done, Sampling()) is None

        def swap(choice: Any) -> None:
            fake.label = "6"  # the weights change while the call runs, and no span says where

        fake.plan += [edit(swap)]
        assert untrainable(ask(engine), Sampling()) == "version_unknown"
        fake.plan += [edit(lambda c: c.update(token_ids=None))]
        assert untrainable(ask(engine), Sampling()) == "no_token_ids"
        fake.plan += [edit(lambda c: c["logprobs"].update(tokens=["token_id:9"] * 3))]
        assert untrainable(ask(engine), Sampling()) == "logprobs_misaligned"


def test_the_version_of_an_adapter_is_in_its_name(fake_vllm: FakeVllm) -> None:
    fake_vllm.models = ["policy", "pol@v3", "pol@v4"]
    engine = engine_of(fake_vllm, model="pol@v3")
    assert engine.version == 3
    assert ask(engine).versions[0].version == 3  # whatever the label says
    engine.use("pol@v4")
    assert ask(engine).versions[0].version == engine.version == 4
    assert [body["model"] for body in fake_vllm.sampled()] == ["pol@v3", "pol@v4"]
    assert [body["cache_salt"] for body in fake_vllm.sampled()] == ["v3", "v4"]
    with pytest.raises(EngineError, match="serves policy, pol@v3, pol@v4, not pol@v9"):
        engine_of(fake_vllm, model="pol@v9")


def test_a_call_to_an_adapter_that_was_unloaded_asks_for_its_successor(fake_vllm: FakeVllm) -> None:
    fake_vllm.models = ["policy", "pol@v3", "pol@v4"]
    engine = engine_of(fake_vllm, model="pol@v3")

    def moved(handler: Any, good: Any) -> None:
        engine.use("pol@v4")
        handler.answer(404, {"error": {"message": "The model `pol@v3` does not exist."}})

    fake_vllm.plan += [moved]
    assert ask(engine).versions[0].version == 4


def test_a_label_nobody_set_can_be_given_a_version() -> None:
    with FakeVllm(label="default") as fake:
        assert engine_of(fake).version == -1
        assert untrainable(ask(engine_of(fake)), Sampling()) == "version_unknown"
        assert untrainable(ask(engine_of(fake, version=0)), Sampling()) is None


# --------------------------------------------------------------------------------------------------------- the address


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://h", "http://", "http://me:secret@h:1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VllmEngine(url)
    assert "secret" not in str(caught.value)


def test_keys_are_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVllm(key="hush") as fake:
        with pytest.raises(EngineError, match="401") as caught:
            engine_of(fake, api_key="wrong")
        assert "wrong" not in str(caught.value)
        assert ask(engine_of(fake, api_key="hush")).finish_reason == "stop"
        monkeypatch.setenv("VLLM_API_KEY", "hush")
        assert ask(engine_of(fake)).finish_reason == "stop"


def test_nobody_there() -> None:
    with FakeVllm() as fake:
        pass
    with pytest.raises(EngineError, match="cannot be reached"):
        VllmEngine(fake.url)
