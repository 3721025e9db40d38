"""Verbs that sum up runs: ``report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from agentsdpo.errors import RunError
from agentsdpo.verbs.base import Json


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="Another run: both on one page.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the page here; RUN/report.html, or "
                                                                 "RUN/compare-OTHER.html, when not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page about a run, or about two runs side by side."""
    from agentsdpo.show.report import write_report

    for folder in (run, *([other] if other else [])):
        if (folder / "run.json").is_file():
            raise RunError(f"{folder} is a benchmark run", fix=f"use: agentsdpo bench report {folder}")
    if other is None:
        path = write_report(run, out)
        from agentsdpo.runfolder import read_run

        typer.echo(json.dumps({"page": str(path), "summary": read_run(run).summary}) if as_json else path)
        return
    from agentsdpo.show.comparison import print_comparison, write_comparison

    path, found = write_comparison(run, other, out)
    if as_json:
        typer.echo(json.dumps({"page": str(path), **found}))
        return
    print_comparison(found)
    typer.echo(f"page: {path}", err=True)


def register(app: typer.Typer) -> None:
    """Add these verbs."""
    app.command()(report)
