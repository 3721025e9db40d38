"""Following a registry onto servers: every new version, restarts of the server, and the publisher's own death."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from agentsdpo.cli import app
from agentsdpo.errors import ConfigError, ModelError, RegistryError, StoreError
from agentsdpo.publish.push_adapter import AdapterPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry
from agentsdpo.publish.served import Served, read_served, write_served
from agentsdpo.publishing import RegistryScorer, follow, make_pusher, newest, registry_at

URL = "http://server:8000"


class Clock:
    """Time that passes when somebody sleeps; ends the follower after a while."""

    def __init__(self, until: float) -> None:
        self.now, self.until = 0.0, until
        self.at: dict[float, Callable[[], Any]] = {}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.at if when <= self.now]:
            self.at.pop(when)()
        if self.now > self.until:
            raise TimeoutError

    def __call__(self) -> float:
        return self.now


def reports(registry: PolicyRegistry, pusher: Any, clock: Clock) -> Iterator[tuple[float, Any]]:
    try:
        for report in follow(registry, pusher, [URL], sleep=clock.sleep, clock=clock):
            yield clock.now, report
    except TimeoutError:
        return


@pytest.fixture
def pusher(registry: PolicyRegistry, fake: Any, scorer_of: Any) -> ReloadPusher:
    return ReloadPusher(scorer_of(registry), connect=fake.connect)


def test_every_new_version_and_every_restart_of_the_server(registry: PolicyRegistry, fake: Any,
                                                           pusher: ReloadPusher, tmp_path: Path) -> None:
    import numpy as np

    clock = Clock(20)
    clock.at = {5: lambda: registry.publish({"q.weight": np.full((1, 1), 7, np.float32)}, learner_step=9),
                10: fake.boot}
    found = [(at, report.version, report.ok) for at, report in reports(registry, pusher, clock)]
    assert found == [(0.0, 2, True), (5.0, 3, True), (10.0, 3, True)]
    assert (fake.value, fake.label) == (7.0, "3")


def test_a_bucket_that_is_away_is_asked_again(registry: PolicyRegistry, pusher: ReloadPusher, monkeypatch: Any,
                                              caplog: pytest.LogCaptureFixture) -> None:
    clock, latest = Clock(20), registry.latest

    def away() -> int | None:
        if clock.now < 5:
            raise StoreError("s3://bucket cannot be reached", fix="look at the network")
        return latest()

    monkeypatch.setattr(registry, "latest", away)
    found = [(at, report.version, report.ok) for at, report in reports(registry, pusher, clock)]
    assert found == [(7.5, 2, True)]  # looks at 0, 0.5, 1.5, 3.5 and 7.5 s
    assert [f"in {pause} s" in record.message for pause, record in
            zip(("0.5", "1", "2", "4"), caplog.records, strict=True)] == [True] * 4


def test_failures_are_tried_again_ever_more_rarely(registry: PolicyRegistry, fake: Any, pusher: ReloadPusher) -> None:
    import numpy as np

    clock = Clock(40)
    fake.faults["/collective_rpc"] = [500, {"results": []}] * 99  # the push fails, what was there comes back
    clock.at = {30: lambda: registry.publish({"q.weight": np.full((1, 1), 7, np.float32)}, learner_step=9),
                35: fake.faults.clear}
    found = [(at, report.version, report.ok) for at, report in reports(registry, pusher, clock)]
    times = [at for at, version, _ in found if version == 2]
    assert not any(ok for at, _, ok in found if at < 35)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 4 * gaps[0]
    assert (30.0, 3, False) in found, "a new version does not wait"
    assert found[-1][1:] == (3, True)


def test_a_damaged_version_is_reported_and_a_later_one_pushed(registry: PolicyRegistry, fake: Any,
                                                              pusher: ReloadPusher) -> None:
    import numpy as np

    path = registry.folder(2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    clock = Clock(6)
    clock.at = {5: lambda: registry.publish({"q.weight": np.full((1, 1), 7, np.float32)}, learner_step=9)}
    found = [report for _, report in reports(registry, pusher, clock)]
    assert "policy version 2 has sha256" in str(found[0].servers[0].error)
    assert (found[-1].version, found[-1].ok, fake.label) == (3, True, "3")


def test_a_registry_that_is_not_there_yet_is_waited_for(tmp_path: Path, fake: Any, scorer_of: Any) -> None:
    import numpy as np

    registry, clock = PolicyRegistry(tmp_path / "later"), Clock(6)
    clock.at = {3: lambda: registry.publish({"q.weight": np.full((1, 1), 7, np.float32)}, learner_step=0)}
    pusher = ReloadPusher(scorer_of(registry), connect=fake.connect)
    assert [at for at, _ in reports(registry, pusher, clock)] == [3.0]
    with pytest.raises(RegistryError, match="no policy version was published in"):
        newest(PolicyRegistry(tmp_path / "never"))


KILLED = '''
"""A publisher that is killed in the middle of a push."""
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from conftest import FakeScorer
from agentsdpo.publish import control
from agentsdpo.publish.push_adapter import AdapterPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry

class Deadly(control.VllmControl):
    def _once(self, method, path, **more):
        if path == sys.argv[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._once(method, path, **more)

registry = PolicyRegistry(sys.argv[1])
ReloadPusher(FakeScorer(registry), connect=Deadly).push(registry, 2, [sys.argv[2]])
'''


@pytest.mark.parametrize("at", ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version",
                                "/resume"])
def test_killed_in_mid_push_the_next_one_goes_on(registry: PolicyRegistry, fake: Any, listening: str, scorer_of: Any,
                                                 tmp_path: Path, at: str) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run([sys.executable, str(script), str(registry.root), listening, at,
                           str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert fake.paused == (at != "/pause"), "nobody could resume it"
    assert read_served(registry.root, listening).pushing == 2
    pusher = ReloadPusher(scorer_of(registry))
    assert not pusher.serves(registry, 2, listening)
    report = pusher.push(registry, 2, [listening])
    assert report.ok, report
    assert (fake.value, fake.label, fake.paused) == (2.0, "2", False)


@pytest.mark.parametrize("at", ["/collective_rpc", "/update_weight_version"])
def test_killed_in_mid_push_the_next_one_may_fail_and_goes_back(registry: PolicyRegistry, fake: Any, listening: str,
                                                                scorer_of: Any, tmp_path: Path, at: str) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    subprocess.run([sys.executable, str(script), str(registry.root), listening, at, str(Path(__file__).parent)])
    fake.faults["/collective_rpc"] = [500]
    report = ReloadPusher(scorer_of(registry)).push(registry, 2, [listening])
    assert "it serves 'default' as before" in str(report.servers[0].error)
    assert (fake.value, fake.label, fake.paused) == (0.0, "default", False)


@pytest.mark.parametrize("before", [None, 1])
@pytest.mark.parametrize("at", ["/pause", "/collective_rpc", "/update_weight_version", "/resume"])
def test_a_server_that_was_only_out_of_reach_is_mended_by_the_next_push(
        registry: PolicyRegistry, fake: Any, scorer_of: Any, at: str, before: int | None) -> None:
    """It did as it was told, its answer was lost and every call after that: it stands paused, on whatever weights."""
    pusher = ReloadPusher(scorer_of(registry), connect=fake.connect)
    if before is not None:
        pusher.push(registry, before, [URL])
    old = fake.value, fake.label
    fake.faults[at] = ["cut"]
    report = pusher.push(registry, 2, [URL])
    assert "the server is gone: started anew it has its own weights, else the next push mends it" in str(
        report.servers[0].error)
    record = read_served(registry.root, URL)
    assert (record.version, record.pushing, record.before and record.before[0]) == (before, 2, old[1])
    fake.alive = True
    fake.faults["/collective_rpc"] = [500]
    report = pusher.push(registry, 2, [URL])
    assert f"it serves {fake.label!r} as before" in str(report.servers[0].error)
    assert (fake.value, fake.label) in (old, (2.0, "2")), "no weights under the label of others"
    assert pusher.push(registry, 2, [URL]).ok
    assert (fake.value, fake.label, fake.paused) == (2.0, "2", False)
    assert read_served(registry.root, URL) == Served(url=URL, version=2, holds=(2,))


def test_a_server_that_started_anew_in_mid_push_is_not_given_what_it_served_before(
        registry: PolicyRegistry, fake: Any, scorer_of: Any) -> None:
    pusher = ReloadPusher(scorer_of(registry), connect=fake.connect)
    pusher.push(registry, 1, [URL])
    fake.faults["/collective_rpc"] = ["die"]
    assert not pusher.push(registry, 2, [URL]).ok
    fake.boot()
    fake.faults["/reset_prefix_cache"] = [500]
    assert "it serves 'default' as before" in str(pusher.push(registry, 2, [URL]).servers[0].error)
    assert (fake.value, fake.label, fake.paused) == (0.0, "default", False)
    assert pusher.push(registry, 2, [URL]).ok


def test_nobody_is_told_to_resume_a_server_that_a_push_left_paused(adapters: PolicyRegistry, fake: Any,
                                                                   scorer_of: Any) -> None:
    pusher = AdapterPusher(scorer_of(adapters), connect=fake.connect)
    fake.paused = True
    write_served(adapters.root, Served(url=URL, pushing=0, before=("default", str(fake.start))))
    error = str(pusher.push(adapters, 1, [URL]).servers[0].error)
    assert "a push that was cut off left it so; push version 0 there first" in error
    assert "/resume" not in error


# ------------------------------------------------------------------------------------------------------------ the verb


PUSHER = '''
import sys
sys.path.insert(0, {here!r})
from conftest import FakeScorer
from agentsdpo.publish.push_adapter import AdapterPusher
from agentsdpo.publish.push_full import ReloadPusher
from agentsdpo.publish.registry import PolicyRegistry
def make(scorer, bound):
    return ReloadPusher(FakeScorer(PolicyRegistry({root!r})), bound=bound)
'''


@pytest.fixture
def own_pusher(registry: PolicyRegistry, tmp_path: Path) -> dict[str, str]:
    """Environment in which ``fake_pusher:make`` can be imported."""
    (tmp_path / "fake_pusher.py").write_text(
        PUSHER.format(here=str(Path(__file__).parent), root=str(registry.root)))
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def test_the_verb_follows_and_survives_kill_9(registry: PolicyRegistry, fake: Any, listening: str,
                                              own_pusher: dict[str, str]) -> None:
    import numpy as np

    words = [sys.executable, "-m", "agentsdpo.cli", "publish", str(registry.root), "--to", listening, "--follow",
             "--json", "--with", "fake_pusher:make"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=own_pusher)

    with start() as first:
        assert first.stdout is not None
        line = json.loads(first.stdout.readline())
        assert (line["ok"], line["version"], line["servers"][0]["changed"]) == (True, 2, True)
        first.kill()
    registry.publish({"q.weight": np.full((1, 1), 7, np.float32)}, learner_step=9)
    with start() as second:
        assert second.stdout is not None
        assert json.loads(second.stdout.readline())["version"] == 3
        fake.boot()
        assert json.loads(second.stdout.readline())["servers"][0]["changed"]
        second.send_signal(signal.SIGTERM)  # as Ctrl-C, not a death in the middle of a push
        assert second.wait(30) == 1
    assert (fake.value, fake.label, fake.paused) == (7.0, "3", False)


def test_the_verb_once_in_words(registry: PolicyRegistry, fake: Any, listening: str,
                                own_pusher: dict[str, str]) -> None:
    words = [sys.executable, "-m", "agentsdpo.cli", "publish", str(registry.root), "--to", listening, "--with",
             "fake_pusher:make"]
    done = subprocess.run(words, capture_output=True, text=True, env=own_pusher)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{listening}: now serves version 2, log-probs within 0 nats, paused for ")
    fake.paused = True
    done = subprocess.run([*words, "--version", "1"], capture_output=True, text=True, env=own_pusher)
    assert done.returncode == 1
    assert "is paused, and no push of this registry did that" in done.stderr
    assert "agentsdpo: version 1 is not on 1 of 1 servers" in done.stderr
    fake.paused = False


@pytest.mark.parametrize(("words", "error", "match"), [
    (["--to", "localhost:8000"], ConfigError, "'localhost:8000' is no address of a server; give one such as http:"),
    (["--to", "http://[::1"], ConfigError, r"'http://\[::1' is no address of a server; give one such as http:"),
    (["--to", URL, "--follow", "--version", "3"], ConfigError, "--version 3 is one version"),
    (["--to", URL, "--with", "nccl"], ConfigError, "--with is 'nccl': .*; use auto, reload, adapter, or module:funct"),
    (["--to", URL, "--version", "9"], RegistryError, "policy version 9 is not in"),
])
def test_requests_that_make_no_sense(registry: PolicyRegistry, words: list[str], error: type[Exception],
                                     match: str) -> None:
    result = CliRunner().invoke(app, ["publish", str(registry.root), *words])
    assert isinstance(result.exception, error), result.output
    with pytest.raises(error, match=match):
        raise result.exception


def test_a_pusher_may_lie_in_the_folder_that_the_verb_is_called_from(registry: PolicyRegistry, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pusher_from_here.py").write_text("def make(scorer, bound):\n    raise ValueError('it was called')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # as the console script has it
    result = CliRunner().invoke(app, ["publish", str(registry.root), "--to", URL, "--with", "pusher_from_here:make"])
    assert "it was called" in str(result.exception)


def test_registry_of_a_run_is_found_in_it(tmp_path: Path) -> None:
    assert registry_at(tmp_path).root == tmp_path
    (tmp_path / "config.toml").touch()
    assert registry_at(tmp_path).root == tmp_path / "policies"


def test_scores_are_those_of_the_published_model(tmp_path: Path) -> None:
    """The seed model against itself, merged and full; weights of another shape are told."""
    import torch

    from agentsdpo.envs.desk.seed import seed_path
    from agentsdpo.learn.load import load_chat, load_model

    registry = PolicyRegistry(tmp_path / "policies", base_model="seed")
    model = load_model(seed_path(), load_chat(seed_path()))
    state = model.state_dict()
    registry.publish(state, learner_step=0)
    scorer = RegistryScorer(registry)
    scorer.load(0)
    ids = [*scorer.prompt, 5, 6, 7]
    with torch.no_grad():
        want = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    assert scorer.logps(ids, 2) == pytest.approx([float(want[-3, 6]), float(want[-2, 7])], abs=1e-5)
    registry.publish({name: tensor for name, tensor in state.items() if "layers.2" not in name}, learner_step=1)
    with pytest.raises(ModelError, match=r"are not those of a Qwen3ForCausalLM: .*Missing key"):
        scorer.load(1)
    unnamed = PolicyRegistry(tmp_path / "unnamed")
    unnamed.publish(state, learner_step=0)
    with pytest.raises(ConfigError, match="does not say which model its versions were trained from; name its folder"):
        make_pusher("reload", unnamed).push(unnamed, 0, [URL])
