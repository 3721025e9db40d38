"""Errors are one sentence with a fix, keep their standard base, and become exit codes on the command line."""

import errno
import inspect
import json
import resource
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
    assert error.exit_code in (1, 2)
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
    assert "the disk is full while writing /runs/a/x; free some space" in capsys.readouterr().err


def test_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError):
        run_main(monkeypatch, PermissionError(errno.EACCES, "denied"))
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, ZeroDivisionError())


def test_interrupt_says_what_is_kept_and_how_to_go_on(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, cli._keeping(Path("runs/a"), "agentsdpo train a.toml --resume"):
        raise KeyboardInterrupt
    assert caught.value.exit_code == 130
    err = capsys.readouterr().err
    assert "Every finished step is kept in runs/a; go on with: agentsdpo train a.toml --resume" in err
    assert exit_code(monkeypatch, KeyboardInterrupt()) == 130


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
