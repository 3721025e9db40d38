"""Keeping programs alive: deaths are told and mended, everything stops together, nothing outlives its starter."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentsdpo.errors import RunError
from agentsdpo.programs.supervise import Program, Supervisor

WAIT = """
import os, sys, time
from agentsdpo.programs.tether import stoppable
stoppable()
print(os.getpid(), flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("tidy", flush=True)
    sys.exit(1)
"""


def program(name: str, code: str, *, ends: bool = False) -> Program:
    return Program(name, [sys.executable, "-c", code], ends=ends)


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().splitlines() if line.isdigit()] if log.exists() else []


def test_the_end_of_one_is_the_end_of_all(tmp_path: Path) -> None:
    looks: list[int] = []
    told: list[str] = []
    keep = Supervisor([program("waits", WAIT), program("done", "import time; time.sleep(3)", ends=True),
                       program("early", "pass")], tmp_path, told.append)
    asyncio.run(keep.run(lambda: looks.append(1), every_s=0.1))
    assert len(looks) > 5
    assert not told, "an end with code 0 is no death"
    log = tmp_path / "waits.log"
    assert log.read_text().splitlines()[-1] == "tidy", "it was asked to stop, not killed"
    assert gone(pids(log)[0])


def test_a_dead_one_is_started_again_and_that_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    log = str(tmp_path / "dies.log")
    done = f"import time, pathlib\nwhile pathlib.Path({log!r}).read_text().count('alive') < 3:\n    time.sleep(0.1)"
    dies = "import os, signal; print('alive', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    keep = Supervisor([program("dies", dies), program("done", done, ends=True)], tmp_path, told.append)
    asyncio.run(keep.run(lambda: None))
    assert told[:2] == ["dies ended with signal SIGKILL (alive); started again in 1 s",
                        "dies ended with signal SIGKILL (alive); started again in 2 s"]


def test_what_cannot_be_kept_alive_ends_everything_with_its_last_words(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = "import sys; print('agentsdpo: steps is -1', file=sys.stderr); sys.exit(2)"
    keep = Supervisor([program("learner", refuses), program("waits", WAIT)], tmp_path, lambda text: None)
    with pytest.raises(RunError, match=r"learner ended with code 2: agentsdpo: steps is -1; mend that"):
        asyncio.run(keep.run(lambda: None))
    assert all(gone(pid) for pid in pids(tmp_path / "waits.log"))
    monkeypatch.setattr("agentsdpo.programs.supervise.MAX_DEATHS", 2)
    keep = Supervisor([program("silent", "import sys; sys.exit(1)")], tmp_path, lambda text: None)
    with pytest.raises(RunError, match="silent ended with code 1: it said nothing"):
        asyncio.run(keep.run(lambda: None))


OUTER = """
import asyncio, sys
from pathlib import Path
from agentsdpo.programs.supervise import Program, Supervisor
signal = __import__("signal"); signal.signal(signal.SIGINT, signal.SIG_IGN)
keep = Supervisor([Program(f"p{i}", [sys.executable, "-c", sys.argv[2]]) for i in range(2)], Path(sys.argv[1]), print)
try:
    asyncio.run(keep.run(lambda: None))
except KeyboardInterrupt:
    print("stopped by hand", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_its_starter_however_that_ends(tmp_path: Path, how: int) -> None:
    outer = subprocess.Popen([sys.executable, "-c", OUTER, str(tmp_path), WAIT], stdout=subprocess.PIPE, text=True)
    logs = [tmp_path / "p0.log", tmp_path / "p1.log"]
    deadline = time.monotonic() + 60
    while not all(pids(log) for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    outer.send_signal(how)
    assert outer.communicate(timeout=90)[0] == ("" if how == signal.SIGKILL else "stopped by hand\n")
    assert all(gone(pid) for log in logs for pid in pids(log))
    assert all(log.read_text().endswith("tidy\n") for log in logs)
