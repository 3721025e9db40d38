"""Verbs between stores: ``diff``, ``merge``, ``fork``, ``split``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.replay.cli.base import Json, Out, Store, Where, existing, verb

if TYPE_CHECKING:
    from agentsdpo.replay.store import ReplayStore

app = typer.Typer(rich_markup_mode=None)
Target = Annotated[str, typer.Argument(metavar="TO", help="Folder or s3:// prefix; made when nothing is there.")]


@verb(app, lists=True)
def diff(out: Out, store: Store, other: Annotated[str, typer.Argument(metavar="OTHER")]) -> None:
    """Compare two stores by key and content."""
    from agentsdpo.replay.upkeep.combine import diff as compare

    a, b = existing(store).snapshot(), existing(other).snapshot()
    found = compare(a, b).as_json()
    rows = [{"key": key, "where": name} for name in ("only_a", "only_b", "other") for key in found[name]]
    words = {"only_a": f"only in {store}", "only_b": f"only in {other}", "other": "other content"}
    out.answer({"store": store, "other": other, "counts": {name: len(keys) for name, keys in found.items()},
                "differences": rows},
               lambda: out.table(["branch", "difference"], [[row["key"], words[row["where"]]] for row in rows]),
               lines="differences")
    out.note(f"{len(found['same'])} branches are the same, {len(rows)} differ")


@verb(app)
def merge(
    out: Out, store: Store, sources: Annotated[list[str], typer.Argument(metavar="SOURCE...")], where: Where = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be copied.")] = False,
) -> None:
    """Copy what STORE lacks from other stores, byte for byte; safe to repeat."""
    from agentsdpo.replay.store import ReplayStore
    from agentsdpo.replay.upkeep.combine import merge as copy

    opened = [existing(source) for source in sources]
    into = existing(store) if dry_run else ReplayStore.open(store)
    plans = [copy(into, source, where=where, dry_run=True) for source in opened]  # a conflict is found before a write
    reports = plans
    if not dry_run:
        with out.progress("branches", sum(plan.copied for plan in plans)) as done:
            reports = [copy(into, source, where=where, done=done) for source in opened]
        into.close()
    rows = [{"source": source, **report.as_json()} for source, report in zip(sources, reports, strict=True)]
    out.answer({"store": store, "dry_run": dry_run, "sources": rows}, lambda: _print_copies(out, "source", rows))


def _print_copies(out: Out, what: str, rows: list[Json]) -> None:
    names = [what, "copied", "episodes", "tokens", "same", "older", "hidden", "late", "policies"]
    out.table(names, [[row[name] for name in names] for row in rows])


@verb(app)
def fork(out: Out, store: Store, to: Target) -> None:
    """Make a second store with the same past: files are linked, and each goes its own way from here on."""
    from agentsdpo.replay.storage import storage_for
    from agentsdpo.replay.upkeep.fork import fork as make

    report = make(existing(store), storage_for(to))
    out.answer({"store": store, "to": to, **report.as_json()}, lambda: (
        f"{to}: {report.branches} branches, {report.files} files ({report.linked} linked), {report.entries} log "
        "entries"))


@verb(app)
def split(
    out: Out, store: Store, to: Target, where: Where = None,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="One store per value, TO/<value>.")] = None,
    parts: Annotated[str | None, typer.Option(metavar="NAME=SHARE,...", help="Shares that add up to 1, as in "
                                              "train=0.9,val=0.1; by a hash, groups whole.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of --parts.")] = 0,
) -> None:
    """Copy into several stores below TO, groups whole; safe to repeat."""
    from agentsdpo.replay.cli.summary import column
    from agentsdpo.replay.upkeep import combine

    if (by is None) == (parts is None):
        raise ConfigError("give either --by or --parts", fix="as in --by env_id or --parts train=0.9,val=0.1")
    opened = existing(store)
    view = opened.snapshot()
    keys = combine.whole_groups(view, view.keys(where))
    found = combine.parts_by_column(view, column(by, view.scalars()), keys) if by is not None else \
        combine.parts_by_share(view, _shares(parts or ""), seed, keys)
    odd = [name for name in found if not _is_name(name)]
    if odd:
        raise ConfigError(f"{odd[0]!r} cannot be the name of a folder", fix="split by another column")
    rows = _split(out, opened, to, found)
    out.answer({"store": store, "to": to, "parts": rows}, lambda: _print_copies(out, "part", rows))


def _split(out: Out, opened: "ReplayStore", to: str, found: dict[str, list[Any]]) -> list[Json]:
    """Copy each part into its store."""
    from agentsdpo.replay.store import ReplayStore
    from agentsdpo.replay.upkeep import combine

    rows = []
    with out.progress("branches", sum(map(len, found.values()))) as done:
        for name, keys in found.items():
            into = ReplayStore.open(f"{to.rstrip('/')}/{name}")
            rows.append({"part": name, **combine.merge(into, opened, keys=keys, done=done).as_json()})
            into.close()
    return rows


def _is_name(text: str) -> bool:
    return bool(text) and text not in (".", "..") and not set(text) & set("/\\\0") and text.isprintable()


def _shares(text: str) -> dict[str, float]:
    """Names and shares of ``train=0.9,val=0.1``."""
    try:
        shares = {name.strip(): float(share) for name, _, share in (part.partition("=") for part in text.split(","))}
    except ValueError as error:
        raise ConfigError(f"--parts is {text!r}", fix="write shares as in train=0.9,val=0.1") from error
    if not (abs(sum(shares.values()) - 1) <= 1e-9 and min(shares.values()) > 0):  # so that NaN is refused
        raise ConfigError(f"the shares of --parts {text} add up to {sum(shares.values()):g}",
                          fix="make them add up to 1, each above 0")
    return shares
