"""Verbs about a store as a whole: ``init``, ``doctor``, and questions in SQL (``sql``, ``view``)."""

from pathlib import Path
from typing import Annotated

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.replay.cli_base import Out, Store, existing, verb

app = typer.Typer()
_NEEDED = ("fsync", "link", "exclusive", "rename")
"""Probes without which nothing can be promised."""


@verb(app)
def init(out: Out, store: Store) -> None:
    """Make a store, once the file system has shown that it can keep one."""
    from agentsdpo.replay.probe import probe
    from agentsdpo.replay.storage import LocalStorage, storage_for
    from agentsdpo.replay.store import ReplayStore

    storage = storage_for(store)
    there = storage.exists("STORE.json")
    if isinstance(storage, LocalStorage) and not there:
        failed = [each for each in probe(storage.root) if each["state"] == "failed" and each["name"] in _NEEDED]
        if failed:
            raise ConfigError(f"the file system of {store} cannot keep a store: {failed[0]['name']}: "
                              f"{failed[0]['detail']}", fix="use a local disk (ext4, xfs, btrfs, apfs), or s3://")
    about = ReplayStore.open(store).about
    words = "was there already" if there else "is made"
    out.answer({"store": store, "made": not there, **about}, lambda: f"{store} {words}: store {about['store_id']}")


@verb(app, lists=True)
def doctor(out: Out, store: Store) -> None:
    """Try what the store needs of its file system: fsync, links, locks, clock, space."""
    from agentsdpo.replay.probe import probe
    from agentsdpo.replay.storage import LocalStorage

    storage = existing(store).storage
    if not isinstance(storage, LocalStorage):
        raise ConfigError(f"{store} is no local folder", fix="doctor tries file systems; object stores need no probe")
    found = probe(storage.root)
    out.answer({"store": store, "probes": found}, lambda: out.table(
        ["probe", "state", "detail"], [list(each.values()) for each in found]), lines="probes")
    if any(each["state"] == "failed" for each in found):
        raise typer.Exit(2)


@verb(app, lists=True)
def sql(out: Out, store: Store, query: Annotated[str, typer.Argument(
        metavar="SQL", help="As in \"SELECT env_id, avg(reward) FROM branches GROUP BY ALL\".")]) -> None:
    """Ask DuckDB; the live rows are the view branches, and nothing can be changed."""
    from agentsdpo.replay.query import run

    names, rows = run(existing(store).snapshot(), query)
    out.answer({"store": store, "columns": names, "rows": [dict(zip(names, row, strict=True)) for row in rows]},
               lambda: out.table(names, rows), lines="rows")


@verb(app)
def view(out: Out, store: Store, create: Annotated[Path, typer.Option(
        "--create", metavar="FILE.db", help="The database to make.")]) -> None:
    """Make a DuckDB database whose view branches shows the live rows of today."""
    from agentsdpo.replay.query import create_view

    snapshot = existing(store).snapshot()
    create_view(snapshot, create)
    out.answer({"store": store, "database": str(create), "snapshot": snapshot.id, "branches": len(snapshot)},
               lambda: f"{create}: view branches, {len(snapshot)} rows; checksums are not verified by DuckDB itself")
