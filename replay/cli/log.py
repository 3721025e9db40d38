"""Verbs that follow a store: ``log``, ``tail``, ``sample``, ``browse``."""

import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from agentsdpo.errors import ConfigError, StoreNotFound
from agentsdpo.replay.cli.base import TIMES, Json, Out, Store, Where, amount, cell, existing, verb

if TYPE_CHECKING:
    from agentsdpo.replay.archive import Packs
    from agentsdpo.replay.folding import Fold
    from agentsdpo.replay.ids import Key
    from agentsdpo.replay.store import ReplayStore

app = typer.Typer(rich_markup_mode=None)
_FIELDS = "t_stored,episode_id,task_id,status,reward,n_turns,n_tokens,policy_version_min"
_ORDER = [("t_stored", "ascending"), ("episode_id", "ascending"), ("branch_id", "ascending")]


@verb(app, lists=True)
def log(
    out: Out, store: Store,
    writer: Annotated[str | None, typer.Option(metavar="ID", help="One stream, by the beginning of its id.")] = None,
) -> None:
    """List the entries of the commit log: who wrote what, in which order."""
    from agentsdpo.replay.archive import Packs
    from agentsdpo.replay.folding import Fold

    fold = Fold(existing(store).storage)
    fold.refresh()
    chosen = [stream for stream in fold.vector if stream.startswith(writer or "")]
    if writer is not None and not chosen:
        raise StoreNotFound(f"no stream starts with {writer!r} among {len(fold.vector)}",
                            fix="list all with: agentsdpo replay log")
    packs = Packs(fold.storage)
    entries = sorted((entry for stream in chosen for entry in _entries(fold, stream, packs)),
                     key=lambda entry: (entry["ts"], entry["writer"], entry["seq"]))
    names = ["ts", "writer", "seq", "operations"]
    out.answer({"store": store, "entries": entries}, lambda: out.table(
        names, [[entry[name] for name in names] for entry in entries]), lines="entries")


def _entries(fold: "Fold", stream: str, packs: "Packs") -> Iterator[Json]:
    """The entries of one stream, in order, from its folder or its archive."""
    from agentsdpo.replay.log import entry_path
    from agentsdpo.replay.storage import read_whole

    place = fold.archived.get(stream)
    for seq in range(fold.vector[stream][0] + 1):
        raw = packs.entry(stream, seq, place) if place else read_whole(fold.storage, entry_path(stream, seq))
        entry = json.loads(raw or b"{}")
        yield {"ts": datetime.fromtimestamp(entry["ts_us"] / 1e6, UTC), "writer": stream, "seq": seq,
               "operations": [_operation(op) for op in entry["ops"]], "sha": entry["sha"], "ops": [
                   {name: value for name, value in op.items() if name != "rows"} for op in entry["ops"]]}


def _operation(op: Json) -> str:
    """One operation in a few words."""
    rows = op.get("rows")
    many = f" {len(rows)} rows" if isinstance(rows, list) else f" {rows} rows" if rows else ""
    more = [str(op[name]) for name in ("kind", "reason", "host", "group_id", "epoch") if name in op]
    return " ".join([op["op"] + many, *more])


@verb(app, lists=True)
def tail(
    out: Out, store: Store, where: Where = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is appended.")] = False,
    since: Annotated[str | None, typer.Option(metavar="AGE|TIME", help="From 90s, 10min, 2h or 1d ago, or from a time "
                                              "in ISO 8601, UTC; the last 10 branches when not given.")] = None,
    fields: Annotated[str, typer.Option(metavar="A,B,...", help="Columns to show.")] = _FIELDS,
    every: Annotated[float, typer.Option(min=0.05, metavar="SECONDS", help="Pause between two looks.")] = 1.0,
) -> None:
    """Print the newest branches, one a line."""
    from agentsdpo.replay.cli import summary

    start = _moment(since) if since else None
    opened = existing(store)
    view = opened.snapshot()
    table = view.scalars(where).sort_by(_ORDER)
    names = [summary.column(name.strip(), table) for name in fields.split(",")]
    rows = table.to_pylist()
    first = [row for row in rows if row["t_stored"] >= start] if start else rows[-10:]
    seen = set(view.rows)
    if out.form == "json" and not follow:
        out.answer({"store": store, "branches": [_some(row, names) for row in first]}, lambda: None)
        return
    if out.form == "text":
        out.say("\t".join(names))
    while True:
        for row in first:
            out.line(_some(row, names), "\t".join(cell(row[name]) for name in names))
        if not follow:
            return
        time.sleep(every)
        first = _fresh(opened, where, seen)


def _some(row: Json, names: list[str]) -> Json:
    return {name: row[name] for name in names}


def _fresh(opened: "ReplayStore", where: str | None, seen: "set[Key]") -> list[Json]:
    """Rows that were not there at the last look; they count as seen from now on."""
    view = opened.snapshot()
    new = view.rows.keys() - seen
    seen |= new
    return view.scalars(where, new).sort_by(_ORDER).to_pylist() if new else []


def _moment(text: str) -> datetime:
    """The time a person means by ``2h`` or ``2026-01-31T12:00``."""
    try:
        return datetime.now(UTC) - timedelta(seconds=amount(text, "--since", TIMES))
    except ConfigError:  # no age: a point in time
        pass
    except OverflowError:  # longer ago than there are dates
        return datetime.min.replace(tzinfo=UTC)
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"--since is {text!r}", fix="write 90s, 10min, 2h, 1d or a time as 2026-01-31T12:00") \
            from error
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@verb(app, lists=True)
def sample(
    out: Out, store: Store, where: Where = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Units to draw.")] = 8,
    strategy: Annotated[str, typer.Option(help="Order of draws, as replay.strategy.")] = "uniform",
    unit: Annotated[str, typer.Option(help="What one draw takes, as replay.unit.")] = "episode",
    group_mode: Annotated[str, typer.Option(help="Whether groups with members missing wait, as replay.group_mode.")
                          ] = "any",
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    max_staleness: Annotated[int | None, typer.Option(min=0, help="Policy versions a unit may be old.")] = None,
    current: Annotated[int | None, typer.Option(min=0, metavar="VERSION", help="The learner's policy version; the "
                                                "newest in the store when not given.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="SHA256", help="Refuse rows of another tokenizer.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Count what each filter removes instead.")] = False,
) -> None:
    """Draw as a learner would, and change nothing."""
    from pydantic import ValidationError

    from agentsdpo.replay.cli.choose import newest
    from agentsdpo.replay.config import ReplayConfig
    from agentsdpo.replay.sampling.sampler import Sampler

    try:
        config = ReplayConfig.model_validate({"strategy": strategy, "unit": unit, "group_mode": group_mode})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{name} is {first['input']!r}", fix=f"{first['msg']}") from error
    sampler = Sampler(existing(store), config, seed=seed, tokenizer_sha256=tokenizer, max_staleness=max_staleness,
                      where=where)
    rows = sampler.snapshot.rows
    version = current if current is not None else newest(sampler.snapshot)
    if explain:
        removed = sampler.explain(version)
        out.answer({"store": store, "version": version, "counts": removed}, lambda: out.table(
            ["filter", "branches"], list(removed.items())))
        return
    drawn = [{"episode_id": key.episode_id, "branch_id": key.branch_id, "attempt": key.attempt,
              "staleness": version - rows[key].version_min, "n_tokens": rows[key].n_tokens,
              "n_trainable": rows[key].n_trainable} for key in sampler.draw(n, version)]
    if not drawn:
        out.note("nothing is eligible; see --explain")
    names = ["episode_id", "branch_id", "attempt", "staleness", "n_tokens", "n_trainable"]
    out.answer({"store": store, "version": version, "snapshot": sampler.snapshot.id, "drawn": drawn}, lambda: out.table(
        names, [[row[name] for name in names] for row in drawn]), lines="drawn")


@verb(app)
def browse(out: Out, store: Store, where: Where = None) -> None:
    """Leaf through the episodes on a terminal."""
    from agentsdpo.replay.cli.browse import Browser

    opened = existing(store)
    if not (out.tty and sys.stdin.isatty()):
        raise ConfigError("browse needs a terminal", fix="use agentsdpo replay ls and show in scripts")
    Browser(opened, out, where=where).run()
