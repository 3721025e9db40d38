"""Errors are one sentence with a fix, keep their standard base, and become exit codes on the command line."""

import errno
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from agentsdpo import __version__, cli, errors
from agentsdpo.errors import AgentSdpoError, ConfigError, RegistryError, TrainForbidden

ALL = [value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, AgentSdpoError)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_says_what_and_how_to_fix(kind: type[AgentSdpoError]) -> None:
    error = kind("cap is 0.5", fix="set it to 1 or more")
    assert str(error) == "cap is 0.5; set it to 1 or more"
    assert str(kind("cap is 0.5")) == "cap is 0.5"
    assert error.exit_code in (1, 2, 4, 5), "3 is for damage that verify found"
    assert kind.__doc__


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not AgentSdpoError])
def test_every_error_is_a_standard_exception_too(kind: type[AgentSdpoError]) -> None:
    standard = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    assert standard[0] not in (Exception, BaseException, object)


def run_main(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The command line with one verb, which raises."""
    def verb() -> None:
        raise error

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verb)
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["agentsdpo"])
    cli.main()


def exit_code(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        run_main(monkeypatch, error)
    return caught.value.code


@pytest.mark.parametrize(("error", "code"), [
    (ConfigError("steps is 0", fix="raise it"), 2), (RegistryError("no version"), 1), (TrainForbidden("t"), 1)])
def test_own_errors_become_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                        error: AgentSdpoError, code: int) -> None:
    assert exit_code(monkeypatch, error) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"agentsdpo: {error}\n")


def test_full_disk_is_named_with_the_way_on(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/runs/a/x")) == 1
    err = capsys.readouterr().err
    assert err == "agentsdpo: the disk is full while writing /runs/a/x (No space left on device); free some space\n"
    assert "--resume" not in err, "a flag that most verbs lack"


def test_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError):
        run_main(monkeypatch, PermissionError(errno.EACCES, "denied"))
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, ZeroDivisionError())


CHILD = """
import errno, signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(*_, out, **__):
    how = __import__("os").environ["HOW"]
    if how != "before":
        folder = out / "arms" / "robust" if sys.argv[1] == "demo" else out
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "x.safetensors")
    if how == "twice":
        import atexit, os
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
    if how == "suite":
        print(__import__("tasks").NAME)
        return
    print("ready", flush=True)
    time.sleep(60)

for name, verb in ("loop", "train"), ("demo", "run_demo"):
    module = types.ModuleType(name)
    setattr(module, verb, work)
    module.conclude = lambda folder: {"arms": {"first": {"final_pass": 0.5}}}
    sys.modules[f"agentsdpo.{name}"] = module
from agentsdpo import cli
cli.main()
"""
"""The command line over verbs that only wait, or find the disk full."""


def child(folder: Path, how: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "child.py").write_text(CHILD)
    (folder / "a.toml").write_text("name = 'first'\n")
    return subprocess.Popen([sys.executable, str(folder / "child.py"), *arguments], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "HOW": how})


@pytest.mark.parametrize(("how", "arguments", "says"), [
    ("kept", "train a.toml --set seed=3", "finished episodes and the newest checkpoint are kept in runs/first, go on "
                                          "with: agentsdpo train a.toml --set seed=3 --resume"),
    ("kept", "train a.toml --resume", "kept in runs/first, go on with: agentsdpo train a.toml --resume"),
    ("before", "train a.toml", "nothing was done yet, start again with: agentsdpo train a.toml"),
    ("twice", "train a.toml", "kept in runs/first, go on with: agentsdpo train a.toml --resume"),
    ("kept", "demo --quick --out runs/x", "kept in runs/x, go on with: agentsdpo demo --quick --out runs/x")])
def test_ctrl_c_is_one_sentence_with_the_way_on(tmp_path: Path, how: str, arguments: str, says: str) -> None:
    process = child(tmp_path, how, *arguments.split())
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("agentsdpo: stopped; ")
    assert err.endswith(f"{says}\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "flag"), [("train a.toml", " --resume"), ("demo", "")])
def test_full_disk_names_the_way_on_of_the_verb(tmp_path: Path, arguments: str, flag: str) -> None:
    process = child(tmp_path, "full", *arguments.split())
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith("agentsdpo: the disk is full while writing x.safetensors (No space left on device); free")
    assert err.endswith(f"go on with: agentsdpo {arguments}{flag}\n")


def test_train_shows_what_came_of_it_and_finds_the_users_tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text("NAME = 'mine'\n")
    (tmp_path / "typer.py").write_text("raise ImportError('an installed module goes first')\n")
    script, work = tmp_path / "elsewhere", tmp_path
    script.mkdir()
    process = child(script, "suite", "train", str(script / "a.toml"), "--json", "--out", "o")
    assert "No module named 'tasks'" in process.communicate(timeout=60)[1], "only the folder it is called from"
    done = subprocess.run([sys.executable, str(script / "child.py"), "train", str(script / "a.toml"), "--json"],
                          cwd=work, env={**os.environ, "HOW": "suite"}, capture_output=True, text=True, check=True)
    mine, summary = done.stdout.splitlines()
    assert mine == "mine"
    assert json.loads(summary) == {"arms": {"first": {"final_pass": 0.5}}}
    assert "curves" not in done.stderr


@pytest.mark.parametrize(("given", "found"), [({}, cli.SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                              ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(tmp_path: Path, given: dict[str, str],
                                                                   found: str | None) -> None:
    """OpenMP reads the variable once, when torch is imported."""
    tasks = "import os, sys\nNAME = os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules\n"
    (tmp_path / "tasks.py").write_text(tasks)
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "a.toml").write_text("")
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "child.py", "train", "a.toml", "--json"], cwd=tmp_path, text=True,
                          env={**env, **given, "HOW": "suite"}, capture_output=True, check=True)
    assert done.stdout.splitlines()[0] == str((found, False))


def test_a_reader_that_leaves_is_no_fault() -> None:
    command = [sys.executable, "-m", "agentsdpo.cli", "config", "--describe"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (0, "")


# ------------------------------------------------------------------------------------------------------ the verbs


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_config_prints_toml_that_it_reads(tmp_path: Path) -> None:
    first = run("config", "--set", "learn.max_staleness=16")
    assert first.exit_code == 0
    path = tmp_path / "c.toml"
    path.write_text(first.stdout)
    assert run("config", str(path)).stdout == first.stdout
    assert json.loads(run("config", str(path), "--json").stdout)["learn"]["max_staleness"] == 16


def test_config_describes_every_setting() -> None:
    listed = json.loads(run("config", "--describe", "--json").stdout)
    assert {"key", "expected", "default", "description"} == set(listed[0])
    assert "learn.max_staleness = 8\n    policy versions" in run("config", "--describe").stdout


def test_refused_settings_reach_the_top(tmp_path: Path) -> None:
    result = run("train", str(tmp_path / "none.toml"))
    assert isinstance(result.exception, ConfigError)
    assert "none.toml cannot be read" in str(result.exception)


def test_help_and_version_are_quick_and_load_nothing_heavy() -> None:
    code = ("import sys; sys.argv = ['agentsdpo', '--help']\n"
            "from agentsdpo import cli\n"
            "try:\n    cli.main()\n"
            "finally:\n    print(*sys.modules, file=sys.stderr)\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = set(done.stderr.split())
    assert "train" in done.stdout
    assert not loaded & {"pydantic", "torch", "numpy", "pyarrow", "transformers", "litellm", "matplotlib"}
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 0.6, "0.3 s are promised on a quiet machine; processor time is measured, with room for a busy one"


def test_version() -> None:
    assert run("--version").stdout.strip() == __version__


@pytest.mark.parametrize(("more", "told"), [((), False), (("--quick",), True), (("--quick", "--json"), False)])
def test_a_quick_demo_is_called_a_look(monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], told: bool) -> None:
    from agentsdpo import demo

    monkeypatch.setattr(demo, "run_demo", lambda **_: {"arms": {"robust": {"final_pass": 0.03}}})
    done = CliRunner().invoke(cli.app, ["demo", *more])
    assert done.exit_code == 0, done.output
    assert ("--quick is a look, not a result" in done.stderr) is told
