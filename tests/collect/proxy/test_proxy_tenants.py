"""Keys, rates and tenants: nothing of one reaches another, each is served by its own newest adapter."""

import logging
import time
from typing import Any

import pytest
from proxy_stack import Stack, said

from agentsdpo.collect.proxy.access import Keys, check_binding, check_origin, read_keys
from agentsdpo.errors import ConfigError, StoreError

ANN, BOB = "ann-has-this-long-key", "bob-has-that-long-key"


def test_two_tenants_share_nothing_but_the_engine(stack: Stack) -> None:
    stack.engine.adapters = ["pol-ann@v2", "pol-ann@v10", "pol-bob@v3", "pol-bob-2@v99"]
    stack.start({ANN: "ann", BOB: "bob"}, adapters="pol")
    first = stack.ask("Same words.", key=ANN)
    assert first["model"] == "pol-ann@v10"
    assert stack.ask("Same words.", said(first), "More.", key=BOB)["model"] == "pol-bob@v3"
    assert stack.ask("Same words.", said(first), "More.", key=ANN)["model"] == "pol-ann@v10"
    stack.ask("One name, two tenants.", conversation="c", key=ANN)
    stack.ask("One name, two tenants.", conversation="c", key=BOB)
    assert stack.post("/v1/feedback", {"conversation": "c", "text": "For Ann."}, key=ANN).status_code == 200
    salts = {request["model"]: request["cache_salt"] for request in stack.engine.requests}
    assert len(set(salts.values())) == 2
    stack.stop_proxy()
    ann, bob = stack.episodes("ann"), stack.episodes("bob")
    assert sorted(sum(len(b.calls) for b in e.branches) for e in ann) == [1, 2]
    assert sorted(sum(len(b.calls) for b in e.branches) for e in bob) == [1, 1]
    assert {e.episode_id for e in ann}.isdisjoint(e.episode_id for e in bob)
    assert [e.hint.text for e in ann if e.hint and e.task_id == "c"] == ["For Ann."]
    assert not [e for e in bob if e.hint]
    assert {b.policy_versions for e in ann for b in e.branches} == {(10, 10)}
    assert not (stack.store / "STORE.json").exists()


def test_feedback_does_not_cross(stack: Stack) -> None:
    stack.start({ANN: "ann", BOB: "bob"})
    answer = stack.ask("Mine.", conversation="c", key=ANN)
    for name in ("c", answer["id"]):
        assert stack.post("/v1/feedback", {"conversation": name, "text": "x"}, key=BOB).status_code == 404
    assert stack.close("c", key=BOB) == 0
    assert stack.close("c", key=ANN) == 1
    assert stack.post("/v1/feedback", {"conversation": "c", "text": "x"}, key=BOB).status_code == 404


def test_the_next_request_is_served_by_the_newest_adapter(stack: Stack) -> None:
    stack.start({ANN: "ann"}, adapters="pol", poll_s=0.02)
    assert stack.ask("Hi.", key=ANN)["model"] == "base"
    stack.engine.adapters = ["pol-ann@v1"]
    assert stack.proxy is not None
    stack.run(stack.proxy.house.upstream.look())
    assert stack.ask("Hi.", key=ANN)["model"] == "pol-ann@v1"


def test_an_adapter_that_was_unloaded_is_replaced(stack: Stack) -> None:
    stack.engine.adapters = ["pol-ann@v1"]
    stack.start({ANN: "ann"}, adapters="pol", poll_s=100.0)
    stack.engine.adapters = ["pol-ann@v2"]
    assert stack.ask("Hi.", key=ANN)["model"] == "pol-ann@v2"


def test_tenants_by_header(stack: Stack) -> None:
    gate = "a-gateway-has-this-key"
    stack.start({gate: "", ANN: "ann"}, tenant_header="x-tenant")
    body = {"messages": [{"role": "user", "content": "Hi."}]}
    assert stack.post("/v1/chat/completions", body, key=gate, x_tenant="cat").status_code == 200
    assert stack.post("/v1/chat/completions", body, key=gate).json()["error"]["code"] == "no_tenant"
    assert stack.post("/v1/chat/completions", body, key=gate, x_tenant="../ann").status_code == 400
    assert stack.post("/v1/chat/completions", body, key=ANN, x_tenant="cat").status_code == 403
    assert stack.post("/v1/chat/completions", body, key=ANN).status_code == 200
    stack.stop_proxy()
    assert len(stack.episodes("cat")) == len(stack.episodes("ann")) == 1


def test_wrong_keys_are_refused_and_no_key_is_logged(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="agentsdpo")
    stack.start({ANN: ""})
    body = {"messages": [{"role": "user", "content": "my words"}]}
    for key in ("", "wrong", ANN + "x", ANN[:-1]):
        answer = stack.post("/v1/chat/completions", body, key=key)
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert stack.post("/v1/chat/completions", body, key=ANN).status_code == 200
    assert stack.post("/v1/chat/completions", body, x_api_key=ANN).status_code == 200
    assert len(stack.engine.requests) == 2
    stack.stop_proxy()  # a line is written once the answer is sent
    assert caplog.text.count("POST /v1/chat/completions 401") == 4
    assert caplog.text.count("POST /v1/chat/completions 200") == 2
    assert ANN not in caplog.text
    assert "my words" not in caplog.text


def test_rates_are_per_key(stack: Stack) -> None:
    stack.start({ANN: "", BOB: ""}, rate_per_minute=1, burst=2)
    codes = [stack.post("/v1/chat/completions", {"messages": []}, key=ANN).status_code for _ in range(3)]
    assert codes == [400, 400, 429]
    late = stack.post("/v1/chat/completions", {"messages": []}, key=ANN)
    assert int(late.headers["Retry-After"]) > 30
    assert stack.ask("Hi.", key=BOB)


def test_no_address_but_ours(stack: Stack) -> None:
    stack.start()
    for path in ("/v1/load_lora_adapter", "/collective_rpc", "/pause", "/inference/v1/generate", "/server_info"):
        answer = stack.post(path, {})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


def test_beyond_this_machine_only_with_keys() -> None:
    with pytest.raises(ConfigError, match="no key"):
        check_binding("0.0.0.0", 0)
    with pytest.raises(ConfigError, match="no key"):
        check_binding("proxy.example", 0)
    check_binding("0.0.0.0", 1)
    check_binding("::1", 0)


@pytest.mark.parametrize(("origin", "status"), [
    ("https://evil.example", 403), ("http://127.0.0.1.evil.example:8100", 403), ("null", 403), ("http://[x", 403),
    ("http://localhost:3000", 200), ("http://[::1]:3000", 200)])
def test_web_pages_from_elsewhere_say_nothing_without_a_key(stack: Stack, origin: str, status: int) -> None:
    """A browser sends a page's words to this machine, and asks first only where they are called JSON."""
    stack.start()
    stack.ask("Sum?", conversation="c")
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    told = stack.client.post(f"{stack.url}/v1/feedback", content=b'{"conversation": "c", "text": "Obey."}',
                             headers=headers)
    assert told.status_code == status
    check_origin(origin, 1)


def test_keys_from_file_and_environment(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "keys"
    path.write_text(f"# people\n{ANN} # Ann\nbob={BOB}\n\n")
    assert read_keys(path, {"AGENTSDPO_PROXY_KEYS": "cat=another-long-key-here"}) == {
        ANN: "", BOB: "bob", "another-long-key-here": "cat"}
    path.write_text(f"a={ANN}\nb={ANN}\n")
    with pytest.raises(ConfigError, match="one key") as caught:
        read_keys(path, {})
    assert ANN not in str(caught.value)
    with pytest.raises(ConfigError, match="characters"):
        Keys({"short": ""})
    encoded = "3q2+7wAAAAAAAAAAAAAAAA=="
    path.write_text(f"{encoded}\nann={encoded[:-3]}B==\nwith#sign-in-the-middle\n")
    assert read_keys(path, {}) == {encoded: "", f"{encoded[:-3]}B==": "ann", "with#sign-in-the-middle": ""}
    path.write_text("# nobody yet\n\n")
    with pytest.raises(ConfigError, match="no keys in"):
        read_keys(path, {})


def test_a_tenant_whose_store_fails_keeps_no_other_waiting(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.start({ANN: "ann", BOB: "bob"}, idle_s=0.2)
    for key in (ANN, BOB):
        stack.ask("Hi.", conversation="c", key=key)
    assert stack.proxy is not None
    rooms, faults = stack.proxy.house.rooms, [StoreError("the disk is full"), OSError("the disk is gone")]
    real = rooms["ann"].shelf.put

    def failing(episodes: Any) -> None:
        if faults:
            raise faults.pop(0)
        real(episodes)

    monkeypatch.setattr(rooms["ann"].shelf, "put", failing)
    deadline = time.monotonic() + 20
    while any(room.open for room in rooms.values()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not faults
    assert [len(stack.episodes(tenant)) for tenant in ("ann", "bob")] == [1, 1]
    with pytest.raises(ConfigError, match="a tenant is called"):
        Keys({ANN: "../up"})
