"""Pushing to a server that misbehaves: it ends with the new version, checked, or with the old one; never paused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.errors import CorruptionError, PushError
from agentsdpo.publish.control import VllmControl
from agentsdpo.publish.nccl import NcclPusher
from agentsdpo.publish.push_adapter import AdapterPusher, AutoPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import Served, read_served, write_served

URL = "http://server:8000"
ScorerOf = Callable[[PolicyRegistry], Any]


@pytest.fixture
def reload(registry: PolicyRegistry, fake: Any, scorer_of: ScorerOf) -> ReloadPusher:
    return ReloadPusher(scorer_of(registry), connect=fake.connect)


@pytest.fixture
def hotload(adapters: PolicyRegistry, fake: Any, scorer_of: ScorerOf) -> AdapterPusher:
    return AdapterPusher(scorer_of(adapters), keep=3, connect=fake.connect)


def state(fake: Any) -> tuple[float, str, bool]:
    return fake.value, fake.label, fake.paused


def test_reload_in_the_required_order(registry: PolicyRegistry, fake: Any, reload: ReloadPusher) -> None:
    assert not reload.serves(registry, 2, URL)
    report = reload.push(registry, 2, [URL])
    assert report.ok, report
    server = report.servers[0]
    assert server.changed
    assert server.pause_s is not None
    assert server.parity_nats == pytest.approx(0, abs=1e-7)
    assert state(fake) == (2.0, "2", False)
    begin = fake.calls.index("/pause")
    assert fake.calls[begin:] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
                                  "/resume", "/v1/completions"]
    assert fake.cache, "the probe was sent before as well, so that a cache that outlives the reload would show"
    assert reload.serves(registry, 2, URL)
    assert read_served(registry.root, URL) == Served(url=URL, version=2, holds=(2,))


def test_workers_that_can_mend_a_tied_output_layer_are_asked_to(registry: PolicyRegistry, fake: Any,
                                                                 reload: ReloadPusher) -> None:
    reload.push(registry, 1, [URL])
    fake.extension = "agentsdpo_worker.TiedHead"
    reload.push(registry, 2, [URL])
    assert fake.methods == ["reload_weights", "reload_weights", "repack_tied_layers"]


def test_pushing_again_changes_nothing(registry: PolicyRegistry, fake: Any, reload: ReloadPusher) -> None:
    reload.push(registry, 1, [URL])
    fake.calls.clear()
    report = reload.push(registry, 1, [URL])
    assert report.ok
    assert not report.servers[0].changed
    assert "/pause" not in fake.calls


def test_a_label_of_another_registry_is_seen_through(registry: PolicyRegistry, fake: Any,
                                                     reload: ReloadPusher) -> None:
    fake.label = "2"
    assert not reload.serves(registry, 2, URL)
    assert reload.push(registry, 2, [URL]).servers[0].changed
    assert state(fake) == (2.0, "2", False)


def test_reset_is_asked_for_until_it_succeeds(registry: PolicyRegistry, fake: Any, reload: ReloadPusher) -> None:
    fake.faults["/reset_prefix_cache"] = [{"success": False}] * 3
    assert reload.push(registry, 1, [URL]).ok
    assert fake.calls.count("/reset_prefix_cache") == 4


@pytest.mark.parametrize(("path", "faults"), [
    ("/pause", [500]), ("/collective_rpc", [500]), ("/collective_rpc", [400]), ("/reset_prefix_cache", [500]),
    ("/update_weight_version", [500]), ("/resume", [500]), ("/collective_rpc", [503] * 4)])
@pytest.mark.parametrize("before", [None, 1])
def test_a_push_that_fails_half_way_leaves_the_old_version(
        registry: PolicyRegistry, fake: Any, reload: ReloadPusher, path: str, faults: list[Any],
        before: int | None) -> None:
    if before is not None:
        reload.push(registry, before, [URL])
    old = state(fake)
    fake.faults[path] = list(faults)
    report = reload.push(registry, 2, [URL])
    assert not report.ok
    assert state(fake) == old
    assert f"it serves {old[1]!r} as before" in str(report.servers[0].error)
    assert not fake.starved
    assert read_served(registry.root, URL) == Served(url=URL, version=before, holds=() if before is None else (before,))
    assert reload.push(registry, 2, [URL]).ok, "and the next try works"
    assert state(fake) == (2.0, "2", False)


def test_weights_that_came_out_differently_are_taken_back(registry: PolicyRegistry, fake: Any,
                                                          reload: ReloadPusher) -> None:
    reload.push(registry, 1, [URL])
    reload.scorer.off = 0.5  # type: ignore[attr-defined]
    report = reload.push(registry, 2, [URL, "http://other:8000"])
    assert state(fake) == (1.0, "1", False)
    assert "differ from the registry's by 0.5 nats in the mean, more than 0.02" in str(report.servers[0].error)
    assert report.servers[1].error == f"left alone: the version did not pass on {URL}"


def test_a_cache_that_was_not_reset_is_found(registry: PolicyRegistry, fake: Any, reload: ReloadPusher) -> None:
    fake.faults["/reset_prefix_cache"] = [{"success": True}]  # says so, and does nothing
    report = reload.push(registry, 2, [URL])
    assert "differ from the registry's" in str(report.servers[0].error)
    assert state(fake) == (0.0, "default", False)


def test_when_the_old_weights_cannot_be_put_back_it_serves_no_version(registry: PolicyRegistry, fake: Any,
                                                                      reload: ReloadPusher) -> None:
    fake.faults["/collective_rpc"] = [500, 500]
    report = reload.push(registry, 2, [URL])
    assert (fake.label, fake.paused) == ("unknown", False), "no request hangs, nothing is mislabelled"
    assert "labelled 'unknown': restart it" in str(report.servers[0].error)
    assert reload.push(registry, 2, [URL]).ok
    assert state(fake) == (2.0, "2", False)


def test_a_dead_server_does_not_keep_the_others_waiting(registry: PolicyRegistry, fake: Any, scorer_of: ScorerOf,
                                                        tmp_path: Path) -> None:
    other = type(fake)(fake.start)
    pusher = ReloadPusher(scorer_of(registry), connect=lambda url: (fake if url == URL else other).connect(url))
    fake.faults["/collective_rpc"] = ["die"]
    report = pusher.push(registry, 1, [URL, "http://other:8000"])
    assert [server.ok for server in report.servers] == [False, True]
    assert "does not answer (Connection refused); the server is gone:" in str(report.servers[0].error)
    assert state(other) == (1.0, "1", False)
    fake.boot()
    assert pusher.push(registry, 1, [URL, "http://other:8000"]).ok


def test_damaged_or_foreign_versions_touch_no_server(registry: PolicyRegistry, adapters: PolicyRegistry, fake: Any,
                                                     reload: ReloadPusher) -> None:
    path = registry.folder(2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptionError, match="policy version 2 has sha256"):
        reload.push(registry, 2, [URL])
    with pytest.raises(PushError, match="policy version 3 is an adapter, no full weights to reload; push it as"):
        reload.push(adapters, 3, [URL])
    assert not fake.calls


def test_a_pause_of_somebody_else_is_left_alone(registry: PolicyRegistry, fake: Any, reload: ReloadPusher) -> None:
    fake.paused = True
    report = reload.push(registry, 2, [URL])
    assert "is paused, and no push of this registry did that" in str(report.servers[0].error)
    assert state(fake) == (0.0, "default", True)


@pytest.mark.parametrize("at", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
                                "/resume", "/v1/completions"])
def test_ctrl_c_in_mid_push_puts_the_old_version_back(registry: PolicyRegistry, fake: Any, reload: ReloadPusher,
                                                      at: str) -> None:
    def stop(path: str) -> None:
        if path == at and "/pause" in fake.calls:
            fake.on_call = lambda path: None
            raise KeyboardInterrupt

    fake.on_call = stop
    with pytest.raises(KeyboardInterrupt):
        reload.push(registry, 2, [URL])
    assert state(fake) == (0.0, "default", False)
    assert reload.push(registry, 2, [URL]).ok


# ------------------------------------------------------------------------------------------------------------ adapters


def test_adapters_are_served_side_by_side_and_the_oldest_is_unloaded(adapters: PolicyRegistry, fake: Any,
                                                                     hotload: AdapterPusher) -> None:
    for version in range(1, 6):
        report = hotload.push(adapters, version, [URL])
        assert report.ok, report
        assert (report.name, report.servers[0].pause_s) == (f"pol@v{version}", 0.0)
    assert list(fake.adapters) == ["pol@v3", "pol@v4", "pol@v5"]
    assert "/pause" not in fake.calls
    assert fake.calls.index("/v1/load_lora_adapter") < fake.calls.index("/v1/unload_lora_adapter")
    record = read_served(adapters.root, URL)
    assert record.version == 5
    assert record.holds == (0, 2, 3, 4, 5), "the one just unloaded keeps its files until the next publication"
    assert adapters.prune(1) == [1]
    assert hotload.serves(adapters, 5, URL)
    assert not hotload.serves(adapters, 4, URL)
    assert not hotload.push(adapters, 5, [URL]).servers[0].changed


def test_an_adapter_is_announced_when_every_server_has_it(adapters: PolicyRegistry, fake: Any,
                                                          scorer_of: ScorerOf) -> None:
    other = type(fake)(fake.start)
    pusher = AdapterPusher(scorer_of(adapters), connect=lambda url: (fake if url == URL else other).connect(url))
    two = [URL, "http://other:8000"]
    assert pusher.push(adapters, 1, two).ok
    other.faults["/v1/load_lora_adapter"] = [500]
    report = pusher.push(adapters, 2, two)
    assert [server.ok for server in report.servers] == [False, False]
    assert "loaded, but not announced before http://other:8000" in str(report.servers[0].error)
    assert [read_served(adapters.root, url).version for url in two] == [1, 1]
    assert not pusher.serves(adapters, 2, URL)
    assert pusher.push(adapters, 2, two).ok
    other.alive = False
    report = pusher.push(adapters, 3, two)
    assert [server.ok for server in report.servers] == [True, False], "a dead server answers nobody, so none waits"
    assert read_served(adapters.root, URL).version == 3


def test_an_adapter_that_does_not_pass_is_unloaded(adapters: PolicyRegistry, fake: Any, hotload: AdapterPusher) -> None:
    hotload.push(adapters, 1, [URL])
    fake.value = 3.0  # another base than the adapters stand on
    report = hotload.push(adapters, 2, [URL])
    assert "if the server was started with another model than version 0, push that first" in str(
        report.servers[0].error)
    assert list(fake.adapters) == ["pol@v1"]
    assert read_served(adapters.root, URL).version == 1


def test_adapters_refuse_another_base_a_pause_and_a_taken_name(adapters: PolicyRegistry, fake: Any,
                                                               hotload: AdapterPusher) -> None:
    fake.label = "7"
    assert "serves weights '7', the adapter stands on version 0" in str(hotload.push(adapters, 1, [URL]).servers[0])
    fake.label, fake.paused = "0", True
    assert "is paused" in str(hotload.push(adapters, 1, [URL]).servers[0].error)
    fake.paused, fake.adapters["pol@v1"] = False, "/elsewhere"
    assert "has 'pol@v1' from /elsewhere" in str(hotload.push(adapters, 1, [URL]).servers[0].error)
    with pytest.raises(PushError, match="version 0 is full weights, no adapter"):
        hotload.push(adapters, 0, [URL])


def test_full_weights_are_not_reloaded_under_adapters(adapters: PolicyRegistry, fake: Any, hotload: AdapterPusher,
                                                      scorer_of: ScorerOf) -> None:
    hotload.push(adapters, 1, [URL])
    report = ReloadPusher(scorer_of(adapters), connect=fake.connect).push(adapters, 0, [URL])
    assert "has adapters on its present weights: pol@v1" in str(report.servers[0].error)


@pytest.fixture
def auto(adapters: PolicyRegistry, fake: Any, hotload: AdapterPusher, scorer_of: ScorerOf) -> AutoPusher:
    return AutoPusher(ReloadPusher(scorer_of(adapters), connect=fake.connect), hotload, connect=fake.connect)


def test_auto_takes_the_way_that_fits(adapters: PolicyRegistry, fake: Any, auto: AutoPusher) -> None:
    assert auto.push(adapters, 0, [URL]).kind == "full"
    assert auto.push(adapters, 1, [URL]).kind == "adapter"
    assert auto.serves(adapters, 1, URL)
    assert (fake.label, list(fake.adapters)) == ("0", ["pol@v1"])


@pytest.mark.parametrize("paused", [True, False])
def test_auto_mends_the_base_first(adapters: PolicyRegistry, fake: Any, auto: AutoPusher, paused: bool) -> None:
    """Killed in the middle of a reload, or left with other weights; meanwhile there are adapters."""
    fake.value, fake.label, fake.paused = 9.0, "4", paused
    write_served(adapters.root, Served(url=URL, pushing=0, before=("default", str(fake.start))))
    report = auto.push(adapters, 2, [URL])
    assert report.ok, report
    assert (state(fake), list(fake.adapters)) == ((0.0, "0", False), ["pol@v2"])


# ---------------------------------------------------------------------------------------------------------------- NCCL


class FakeSender:
    """The other side of a transfer; ``met`` says whether both sides were there at once."""

    def __init__(self, fake: Any, weights: Any, broken: bool = False) -> None:
        self.fake, self.weights, self.broken, self.done = fake, weights, broken, list[str]()

    def init_info(self) -> dict[str, Any]:
        return {"world_size": 2}

    def join(self) -> None:
        self._meet("join", self.fake.joining)

    def update_info(self) -> dict[str, Any]:
        return {"names": list(self.weights)}

    def send(self) -> None:
        assert self.fake.started, "a byte was sent before /start_weight_update had returned"
        if self.broken:
            raise OSError("link down")
        self.fake.value = float(self.weights["q.weight"][0, 0])
        self._meet("send", self.fake.updating)

    def leave(self) -> None:
        self.done.append("leave")

    def _meet(self, what: str, event: Any) -> None:
        assert event.wait(10), f"{what} was not run beside the server's half"
        self.done.append(what)


@pytest.mark.parametrize("broken", [False, True])
def test_native_transfer_keeps_the_ordering_rule(registry: PolicyRegistry, fake: Any, scorer_of: ScorerOf,
                                                 broken: bool) -> None:
    from threading import Event

    fake.joining, fake.updating, fake.started = Event(), Event(), False
    senders = list[FakeSender]()

    def do(name: str, act: Callable[[Any], None]) -> None:
        setattr(fake, f"do_{name}", lambda body: (act(body), (200, {}))[1])

    def finish(body: Any) -> None:
        fake.label = body["weight_version"]

    do("init_weight_transfer_engine", lambda body: fake.joining.set())
    do("start_weight_update", lambda body: setattr(fake, "started", fake.paused))
    do("update_weights", lambda body: fake.updating.set())
    do("finish_weight_update", finish)
    do("shutdown_weight_transfer_engine", lambda body: None)

    def sender(weights: Any) -> FakeSender:
        senders.append(FakeSender(fake, weights, broken))
        return senders[-1]

    report = NcclPusher(scorer_of(registry), sender, connect=fake.connect).push(registry, 2, [URL])
    assert senders[0].done[-1] == "leave"
    if broken:
        assert "the sender failed: OSError('link down')" in str(report.servers[0].error)
        assert state(fake) == (0.0, "default", False), "the old weights came back from disk"
    else:
        assert report.ok, report
        assert senders[0].done == ["join", "send", "leave"]
        assert state(fake) == (2.0, "2", False)


# ------------------------------------------------------------------------------------------------------------- control


def test_control_says_what_to_do(fake: Any) -> None:
    with fake.connect(URL + "/v1/") as server:
        assert server.url == URL
        fake.faults["/pause"] = [404]
        with pytest.raises(PushError, match="/pause answered 404: injected 404; see the server's log"):
            server.pause()
        with pytest.raises(PushError, match=r"answered 404: Not Found; start the server with VLLM_SERVER_DEV_MODE=1"):
            server.post("/nothing", {})
        fake.faults["/v1/completions"] = [401]
        with pytest.raises(PushError, match="set VLLM_API_KEY"):
            server.sample("pol", [1], 1)
        fake.faults["/v1/completions"] = [{"choices": [{"token_ids": None, "logprobs": None}]}]
        with pytest.raises(PushError, match="a probe of 2 tokens with 0 ids and 0 log-probs"):
            server.sample("pol", [1], 2)
        fake.faults["/reset_prefix_cache"] = [{"success": False}] * 9
        with pytest.raises(PushError, match="did not reset its prefix cache within 0.05 s"):
            server.reset_cache(within_s=0.05)


@pytest.mark.parametrize("said", [
    {"html": "<html>hello</html>"}, {"json": {"data": [{"id": "m", "object": "model"}]}}, {"json": {"data": []}},
    {"json": []}, {"text": "{", "headers": {"content-type": "application/json"}}])
def test_a_server_that_is_no_vllm_is_an_outcome(registry: PolicyRegistry, scorer_of: ScorerOf, said: dict[str, Any]
                                                ) -> None:
    import httpx

    def connect(url: str) -> VllmControl:
        return VllmControl(url, transport=httpx.MockTransport(lambda _: httpx.Response(200, **said)))

    report = ReloadPusher(scorer_of(registry), connect=connect).push(registry, 1, [URL])
    assert report.servers[0].error == (f"{URL}/v1/models does not answer as vLLM does; give --to the address of a vLLM "
                                       "server, with no path but /v1")


def test_key_is_sent_and_not_shown(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    import httpx

    monkeypatch.setenv("VLLM_API_KEY", "very-secret")
    seen = list[str]()

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["authorization"])
        return httpx.Response(401, json={"error": "Unauthorized"})

    with VllmControl(URL, transport=httpx.MockTransport(refuse)) as server, pytest.raises(PushError) as caught:
        server.base()
    assert seen == ["Bearer very-secret"]
    assert "very-secret" not in str(caught.value)


def test_a_proxy_of_the_environment_is_not_asked_for_a_server(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """Nobody else's requests to model servers go there either: a collector's reach a server, and so must a push."""
    listener, url = fake.listen()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        with VllmControl(url) as server:
            assert server.label() == fake.label
    finally:
        listener.shutdown()
        listener.server_close()
