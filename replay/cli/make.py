"""Verbs about a store as a whole: ``init``, ``doctor``, and questions in SQL (``sql``, ``view``)."""

from pathlib import Path
from typing import Annotated

import typer

from agentsdpo.replay.cli.base import Json, Out, Store, existing, verb

app = typer.Typer(rich_markup_mode=None)


@verb(app)
def init(
    out: Out, store: Store,
    reserve: Annotated[int, typer.Option(min=0, metavar="MIB", help="Room held back on a local disk, so that a full "
                                         "one cuts nothing off.")] = 64,
) -> None:
    """Make a store, once the place has shown that it can keep one; take the reserve of an old one again."""
    from agentsdpo.replay.storage import storage_for
    from agentsdpo.replay.store import ReplayStore

    there = storage_for(store).exists("STORE.json")
    about = ReplayStore.open(store, reserve_bytes=reserve << 20).about
    words = "was there already" if there else "is made"
    out.answer({"store": store, "made": not there, **about}, lambda: f"{store} {words}: store {about['store_id']}")


@verb(app, lists=True)
def doctor(out: Out, store: Store) -> None:
    """Try what a store needs of the place it lies in, and how fast that is."""
    from agentsdpo.replay.cli.probe import probe
    from agentsdpo.replay.fitness import examine
    from agentsdpo.replay.storage import LocalStorage

    storage = existing(store).storage
    found: list[Json] = [{"name": each.name, "state": "ok" if each.good else "failed" if each.needed else "warning",
                          "detail": each.what} for each in examine(storage)]
    if isinstance(storage, LocalStorage):
        found += probe(storage.root)
    out.answer({"store": store, "probes": found}, lambda: out.table(
        ["probe", "state", "detail"], [list(each.values()) for each in found]), lines="probes")
    if any(each["state"] == "failed" for each in found):
        raise typer.Exit(2)


@verb(app, lists=True)
def sql(out: Out, store: Store, query: Annotated[str, typer.Argument(
        metavar="SQL", help="As in \"SELECT env_id, avg(reward) FROM branches GROUP BY ALL\".")]) -> None:
    """Ask DuckDB; the live rows are the view branches, and nothing can be changed."""
    from agentsdpo.replay.cli.query import run

    names, rows = run(existing(store).snapshot(), query)
    out.answer({"store": store, "columns": names, "rows": [dict(zip(names, row, strict=True)) for row in rows]},
               lambda: out.table(names, rows), lines="rows")


@verb(app)
def view(out: Out, store: Store, create: Annotated[Path, typer.Option(
        "--create", metavar="FILE.db", help="The database to make.")]) -> None:
    """Make a DuckDB database whose view branches shows the live rows of today."""
    from agentsdpo.replay.cli.query import create_view

    snapshot = existing(store).snapshot()
    create_view(snapshot, create)
    out.answer({"store": store, "database": str(create), "snapshot": snapshot.id, "branches": len(snapshot)},
               lambda: f"{create}: view branches, {len(snapshot)} rows; checksums are not verified by DuckDB itself")
