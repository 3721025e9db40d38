"""Verbs of the benchmark: run, resume, grade, report, compare, show, export, import, doctor.

Exit codes: 0 done, 1 error, 2 usage, 3 finished with unscored attempts, 4 no such run or attempt.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.verbs.base import Json, fail, override, stopped

UNSCORED = 3
"""Exit code of a run that is finished but for attempts that could not be scored."""

bench = typer.Typer(name="bench", no_args_is_help=True, rich_markup_mode=None,
                    help="Measure an agent on a benchmark: attempts, grades, intervals, reports.",
                    context_settings={"help_option_names": ["-h", "--help"]})

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a benchmark run.")]
Config = Annotated[Path | None, typer.Argument(metavar="[CONFIG.toml]", help="Settings; flags alone will do.")]
Suite = Annotated[str | None, typer.Option(help="desk-mini, desk, or the path of a benchmark or a task file.")]
Tasks = Annotated[int | None, typer.Option(min=1, help="The first so many tasks.")]
Judge = Annotated[str | None, typer.Option(metavar="MODEL", help="Model that judges what no program can, as litellm "
                                                                 "names it.")]
Concurrency = Annotated[int | None, typer.Option(min=1, help="Attempts in flight at once.")]
Sets = Annotated[list[str] | None, override("budget.turns=40")]


@bench.command()
def run(
    config: Config = None, suite: Suite = None, tasks: Tasks = None,
    model: Annotated[str | None, typer.Option(help="seed, a model folder, a served or hosted model, or a scripted "
                                                   "agent such as oracle or null.")] = None,
    engine: Annotated[str | None, typer.Option(help="inprocess, vllm, litellm, script; auto goes by the name.")] = None,
    url: Annotated[str | None, typer.Option(help="Address of a vLLM server.")] = None,
    attempts: Annotated[int | None, typer.Option(min=1, help="Attempts per task.")] = None,
    concurrency: Concurrency = None,
    profile: Annotated[str | None, typer.Option(help="desk, apex_v1 or apex_v1_1: budgets and limits.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all draws.")] = None,
    judge: Judge = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/bench/<suite>-<model>-<time> when not given."
                                             )] = None,
    sets: Sets = None, as_json: Json = False,
) -> None:
    """Play every attempt, grade it and write the reports."""
    settings = _settings(config, {"suite": suite, "tasks": tasks, "model": model, "engine": engine, "url": url,
                                  "attempts": attempts, "concurrency": concurrency, "profile": profile, "seed": seed},
                         judge, sets)
    from agentsdpo.benchmarks.apex.start import start

    _play(start(settings, out or _default_out(settings)), as_json)


@bench.command()
def resume(folder: Run, concurrency: Concurrency = None,
           url: Annotated[str | None, typer.Option(help="Address of a vLLM server, if it has moved.")] = None,
           as_json: Json = False) -> None:
    """Go on with a run: unfinished attempts from where they were, unscored ones again."""
    from agentsdpo.benchmarks.apex.start import reopen

    _play(reopen(folder, {"concurrency": concurrency, "url": url}), as_json)


@bench.command()
def grade(folder: Run, judge: Judge = None, sets: Sets = None, as_json: Json = False) -> None:
    """Grade a run again without playing anything; old grades are kept."""
    from agentsdpo.benchmarks.apex.grading import regrade
    from agentsdpo.benchmarks.apex.progress import shown
    from agentsdpo.benchmarks.apex.runfolder import BenchFolder

    other = [one for one in sets or () if one.partition("=")[0].partition(".")[0].strip() != "judge"]
    if other:
        raise ConfigError(f"--set {other[0]} changes no grade of what was played", fix="set settings of the judge, as "
                          "in --set judge.temperature=0")
    chosen = _settings(None, {}, judge, sets).judge if judge or sets else None
    with _kept(folder, "grade"), shown("grading") as told:
        regrade(folder, chosen, told=told)
    _finish(BenchFolder(folder), as_json)


@bench.command()
def report(folder: Run, against: Annotated[Path | None, typer.Argument(metavar="[RUN2]", help="Compare with this run.")
                                           ] = None,
           force: Annotated[bool, typer.Option("--force", help="Compare runs that were not made alike.")] = False,
           as_json: Json = False) -> None:
    """Write report.json, report.md and report.html, and print the numbers."""
    from agentsdpo.benchmarks.apex.report import make_report, print_report
    from agentsdpo.benchmarks.apex.runfolder import BenchFolder

    other = BenchFolder.find(against) if against else None
    _tell(make_report(BenchFolder.find(folder), other, force=force), as_json, print_report)
    typer.echo(f"pages: {folder / 'report.html'}", err=True)


@bench.command()
def compare(first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
            second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another.")],
            force: Annotated[bool, typer.Option("--force", help="Compare runs that were not made alike.")] = False,
            as_json: Json = False) -> None:
    """Difference A - B on the tasks scored in both, with interval, p value and what could have been seen."""
    from agentsdpo.benchmarks.apex.compare import compare_runs
    from agentsdpo.benchmarks.apex.report import print_comparison
    from agentsdpo.benchmarks.apex.runfolder import BenchFolder

    _tell(compare_runs(BenchFolder.find(first), BenchFolder.find(second), force=force), as_json, print_comparison)


@bench.command()
def show(folder: Run, task: Annotated[str, typer.Argument(metavar="TASK", help="Id of the task.")],
         attempt: Annotated[int, typer.Argument(metavar="ATTEMPT", help="Number of the attempt, from 0.")] = 0,
         as_json: Json = False) -> None:
    """Print one attempt: its grade, its messages, its calls."""
    from agentsdpo.benchmarks.apex.runfolder import BenchFolder
    from agentsdpo.benchmarks.apex.show import one_attempt, print_attempt

    _tell(one_attempt(BenchFolder.find(folder), task, attempt), as_json, print_attempt)


@bench.command()
def export(folder: Run, to: Annotated[str, typer.Option("--to", help="archipelago, atif, inspect or verifiers.")],
           out: Annotated[Path | None, typer.Option(help="Folder to write into; export/ of the run when not given.")
                          ] = None,
           as_json: Json = False) -> None:
    """Write the attempts of a run as another tool reads them."""
    from agentsdpo.benchmarks.apex.exports import export_run
    from agentsdpo.benchmarks.apex.runfolder import BenchFolder

    written = export_run(BenchFolder.find(folder), to, out)
    typer.echo(json.dumps({"to": to, "path": str(written)}) if as_json else str(written))


@bench.command(name="import")
def import_(path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder.")],
            fmt: Annotated[str, typer.Option("--from", help="apex, harbor, inspect or atif.")],
            out: Annotated[Path, typer.Option(help="Folder of the run to be made.")],
            suite: Annotated[str | None, typer.Option(help="Benchmark whose tasks these are, for bench grade.")] = None,
            tasks: Tasks = None, sets: Sets = None, as_json: Json = False) -> None:
    """Make a run of attempts that another tool made; every message stays as it was said."""
    from agentsdpo.benchmarks.apex.imports import import_run

    if suite is None and (tasks is not None or sets):
        raise ConfigError("--tasks and --set are settings of a benchmark, and none is named", fix="give --suite")
    made = import_run(path, fmt, out, _settings(None, {"suite": suite, "tasks": tasks}, None, sets) if suite else None)
    if as_json:
        typer.echo(json.dumps(made))
        return
    typer.echo(f"{made['attempts']} attempts at {made['tasks']} tasks, {made['messages']} messages, {made['scored']} "
               f"with grades: {made['path']}")
    for name, count in made["lost"].items():
        typer.echo(f"no place for {name}, {count} times", err=True)


@bench.command()
def doctor(config: Config = None, suite: Suite = None, tasks: Tasks = None, judge: Judge = None, sets: Sets = None,
           as_json: Json = False) -> None:
    """Check a benchmark: agents that do nothing pass nothing, the oracle passes all, twice is the same."""
    from agentsdpo.benchmarks.apex.doctor import examine

    checks = examine(_settings(config, {"suite": suite, "tasks": tasks}, judge, sets))
    if as_json:
        typer.echo(json.dumps([check.model_dump() for check in checks]))
    else:
        for check in checks:
            typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<24}{check.detail}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


# ----------------------------------------------------------------------------------------------------- shared


def _settings(config: Path | None, flags: dict[str, Any], judge: str | None, sets: list[str] | None) -> Any:
    from agentsdpo.benchmarks.apex.config import load

    return load(config, flags, [*([f"judge.model={json.dumps(judge)}"] if judge else []), *(sets or [])])


def _default_out(settings: Any) -> Path:
    """A folder that says what it holds and is not there yet."""
    from datetime import datetime

    name = f"{Path(settings.suite).stem}-{Path(settings.model).name}"
    return Path("runs") / "bench" / f"{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"


def _kept(folder: Path, verb: str) -> Any:
    """On Ctrl-C, say what is kept and how to go on."""
    from contextlib import contextmanager

    @contextmanager
    def block() -> Any:
        try:
            yield
        except KeyboardInterrupt:
            stopped(f"; what is finished is kept in {folder}, go on with: agentsdpo bench {verb} {folder}")

    return block()


def _play(made: Any, as_json: bool) -> None:
    """Play what is left, then the scripted agents, then the reports."""
    from agentsdpo.benchmarks.apex.progress import shown
    from agentsdpo.benchmarks.apex.references import play_references

    with _kept(made.folder.path, "resume"):
        with shown(f"{made.about['benchmark']} {made.agent.name}") as told:
            made.told = told
            made.play()
        play_references(made)
    _finish(made.folder, as_json)


def _finish(folder: Any, as_json: bool) -> None:
    """Reports, and the exit code that says whether every attempt was scored."""
    from agentsdpo.benchmarks.apex.report import make_report, print_report

    result = make_report(folder)
    _tell(result, as_json, print_report)
    typer.echo(f"pages: {folder.path / 'report.html'}", err=True)
    imported = "imported" in folder.about()  # who knows how many attempts were asked for
    lost = sum(result["overall"]["n_unscored"].values()) + (0 if imported else result["n_missing"])
    if lost:
        again = "grade" if imported else "resume"
        fail(f"{lost} attempts have no score; try them again with: agentsdpo bench {again} {folder.path}", UNSCORED)


def _tell(data: Any, as_json: bool, words: Any) -> None:
    """Data for programs, words for people."""
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False))
    else:
        words(data)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(bench)
