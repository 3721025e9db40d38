"""Starting a server: the command and environment it gets, and what happens when it does not come up."""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from fake_vllm import FakeVllm

from agentsdpo.errors import ConfigError, EngineError, OutputError
from agentsdpo.serve import VENV, ServeOptions, Server, command, environment, find_vllm

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = "#!/bin/sh\n{body}\n"


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for the interpreter that has vLLM; a test writes what it does."""
    path = tmp_path / "python"
    path.write_text(SCRIPT.format(body="echo it broke; exit 3"))
    path.chmod(0o755)
    monkeypatch.setenv("AGENTSDPO_VLLM_PYTHON", str(path))
    return path


def test_flags_that_recording_needs_are_there() -> None:
    words = " ".join(command(ServeOptions("m", adapters=4, max_rank=16, extra=("--seed", "1")), ["python"], 81))
    for needed in ("--logprobs-mode processed_logprobs", "--generation-config vllm", "--enable-scale-out",
                   "--host 127.0.0.1 --port 81", "--dtype float32", "--enforce-eager", "--no-enable-chunked-prefill",
                   "--max-loras 4 --max-lora-rank 16", "--seed 1"):
        assert needed in words
    gpu = command(ServeOptions("m", gpu=True, kept_sets=True), ["vllm"], 81)
    assert "--return-sampling-mask" in gpu
    assert "float32" not in gpu
    with pytest.raises(ConfigError, match="no sampling mask on CPUs"):
        ServeOptions("m", kept_sets=True)


def test_the_environment_hands_on_the_key_and_nothing_of_this_venv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "hush")
    monkeypatch.setenv("VIRTUAL_ENV", "/elsewhere")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    own = environment(ServeOptions("m"))
    assert own["VLLM_API_KEY"] == "hush"
    assert own["VLLM_SERVER_DEV_MODE"] == "1"
    assert own["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert "GOMP_SPINCOUNT" not in own, "set by our own command line, it would outdo OMP_WAIT_POLICY"
    assert "VIRTUAL_ENV" not in own
    assert "hush" not in " ".join(command(ServeOptions("m"), ["python"], 81))


@pytest.mark.vllm
def test_nobody_spins_in_vllm_on_few_cores() -> None:
    if not (ROOT / VENV).exists() and not os.environ.get("AGENTSDPO_VLLM_PYTHON"):
        pytest.skip("no .venv-vllm here: make vllm builds it")
    own = environment(ServeOptions("m"))
    assert own["OMP_WAIT_POLICY"] == "PASSIVE"
    ask = ("from vllm.distributed import utils\n"
           "from vllm.distributed.device_communicators import shm_broadcast\n"
           "from vllm.plugins import load_general_plugins\n"
           "assert shm_broadcast.sched_yield is utils.sched_yield, 'vLLM waits in another way now'\n"
           "load_general_plugins()\n"
           "import time\nbegan = time.monotonic()\nfor _ in range(1000): shm_broadcast.sched_yield()\n"
           "print('asleep for', time.monotonic() - began)  # a loop of yields takes a thousandth of that")
    said = subprocess.run([find_vllm()[0], "-c", ask], env=own, capture_output=True, text=True, timeout=300,
                          check=False)
    found = re.search(r"asleep for (\S+)", said.stdout)
    assert found, said.stderr[-2000:]
    assert float(found[1]) >= 0.2, "1,000 naps of 0.2 ms"


def test_where_vllm_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSDPO_VLLM_PYTHON", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be run"):
        find_vllm()
    monkeypatch.delenv("AGENTSDPO_VLLM_PYTHON")
    monkeypatch.setattr("agentsdpo.serve.VENV", "no/such/place")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="make vllm"):
        find_vllm()
    (tmp_path / "vllm").write_text(SCRIPT.format(body=""))
    (tmp_path / "vllm").chmod(0o755)
    assert find_vllm() == [str(tmp_path / "vllm"), "serve"]


def test_a_server_that_ends_at_once_is_told_with_its_last_words(python: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"ended with code 3 while starting(.|\n)*it broke"):
        Server.start(ServeOptions("m", port=0), log=tmp_path / "log")
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    with pytest.raises(OutputError, match="log/more cannot be written: Not a directory; name a file in a folder"):
        Server.start(ServeOptions("m", port=0), log=tmp_path / "log" / "more")


def test_a_port_that_is_taken_is_no_server_of_ours(python: Path, fake_vllm: FakeVllm) -> None:
    with pytest.raises(ConfigError, match="Address already in use.*another --port"):
        Server.start(ServeOptions("m", port=fake_vllm.port))
    assert not fake_vllm.requests  # its label was left alone


def test_a_server_that_never_answers_is_given_up_and_stopped(python: Path, tmp_path: Path) -> None:
    python.write_text(SCRIPT.format(body=f"echo $$ > {tmp_path}/pid; exec sleep 100"))
    waited: list[float] = []
    with pytest.raises(EngineError, match="did not answer within 1 s"):
        Server.start(ServeOptions("m", port=0), log=tmp_path / "log", timeout_s=1.0, tell=waited.append)
    assert waited
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
