"""Verbs that check a store and make it whole again: ``verify``, ``recover``, ``compact``."""

from pathlib import Path
from typing import Annotated

import typer

from agentsdpo.errors import CorruptionError
from agentsdpo.replay.cli.base import SIZES, Out, Sole, Store, Yes, amount, existing, fail, size, verb

app = typer.Typer(rich_markup_mode=None)


@verb(app, lists=True)
def verify(
    out: Out, store: Store,
    level: Annotated[str, typer.Option(help="fast: the log; full: every byte; deep: every token too.")] = "full",
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Save what is whole in damaged files, and put those "
                                             "aside.")] = False,
    yes: Yes = False, sole_maintainer: Sole = False,
) -> None:
    """Check that the store holds what was written; exits 3 when it does not."""
    from agentsdpo.replay import verify as check

    try:
        opened = existing(store)
    except CorruptionError as error:
        fail(str(error), 3, colour=out.colour)
    with out.progress(f"checking at level {level}"):
        report = check(opened, level, quarantine=quarantine and yes,  # pyright: ignore[reportArgumentType]
                       sole_maintainer=sole_maintainer)
    found = report.as_json()
    names = ["level", "path", "key", "what", "fix"]
    words = (f"{report.entries} log entries, {report.files} files ({size(report.bytes)}), {report.rows} branches: "
             f"{'no damage' if report.ok else f'{len(report.problems)} problems'} at level {level}")
    out.answer({"store": store, **found}, lambda: None if report.ok else out.table(
        names, [[problem[name] for name in names] for problem in found["problems"]]), lines="problems")
    out.note(words)
    if report.orphans:
        out.note(f"{report.orphans} data files that no entry names, harmless: agentsdpo replay recover settles them")
    for path in report.quarantined:
        out.note(f"put aside: {path}")
    if report.quarantined:
        out.note(f"{report.saved} branches of these were saved, {report.lost} are lost: evicted, by whole groups")
    if quarantine and not yes and not report.ok:
        out.note("nothing was put aside; do it with --yes")
    if not report.ok:
        raise typer.Exit(3)


@verb(app)
def recover(
    out: Out, store: Store,
    adopt: Annotated[bool, typer.Option("--adopt", help="Take data files whose commit was cut off into the store.")
                     ] = False,
    close: Annotated[bool, typer.Option("--close", help="Close the streams of all writers, living ones too.")] = False,
    spool: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the journals are.")] = None,
    yes: Yes = False,
) -> None:
    """Make a store whole after a crash: salvage journals, close dead writers, settle orphans."""
    from agentsdpo.replay.upkeep.recover import recover as mend

    opened = existing(store)
    with out.progress("recovering"):
        report = mend(opened, spool=spool, adopt=adopt, close=close, dry_run=not yes)
    document = {"store": store, **report.as_json()}
    names = ["what", "path", "writer", "detail"]
    out.answer(document, lambda: out.table(names, [[each[name] for name in names] for each in document["found"]]))
    out.note(f"{report.changed} things {'were' if yes else 'would be'} changed{'' if yes else '; do it with --yes'}")


@verb(app)
def compact(
    out: Out, store: Store,
    target_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a compacted file, about.")] = "128MiB",
    max_row_groups: Annotated[int, typer.Option(min=1, help="Of a compacted file.")] = 512,
    purge: Annotated[bool, typer.Option("--purge", help="Rewrite every file that holds something hidden, so that gc "
                                        "can delete the last of it.")] = False,
    yes: Yes = False, sole_maintainer: Sole = False,
) -> None:
    """Write many small files into few large ones, pack closed streams, fold the log."""
    from agentsdpo.replay import compact as rewrite

    opened, target = existing(store), int(amount(target_size, "--target-size", SIZES))
    with out.progress("compacting"):
        report = rewrite(opened, target_bytes=target, max_row_groups=max_row_groups, purge=purge,
                         dry_run=not yes, sole_maintainer=sole_maintainer)
    words = f"{len(report.inputs)} files ({size(report.bytes_before)}, {report.rows} branches)"
    packed = f", {report.archived} closed streams packed" if report.archived else ""
    done = f"rewrote {words} into {len(report.outputs)} ({size(report.bytes_after)}){packed}"
    out.finish(yes, {"store": store, **report.as_json()}, done, f"would rewrite {words}{packed}")
