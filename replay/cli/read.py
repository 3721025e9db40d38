"""Verbs that look at a store: ``ls``, ``show``, ``stats``, ``schema``."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentsdpo.errors import ConfigError
from agentsdpo.replay.cli.base import Json, Out, Store, Where, existing, size, verb

if TYPE_CHECKING:
    import pyarrow as pa

app = typer.Typer(rich_markup_mode=None)
_COLUMNS = ("episode_id", "attempt", "branch_id", "env_id", "task_id", "status", "reward", "n_turns", "n_tokens",
            "n_trainable", "policy_version_min", "policy_version_max", "t_stored")
_DULL = {"attempt": 0, "branch_id": 0, "status": "sealed"}
"""Columns a terminal does without when every row has this value."""
_HEADS = {"episode_id": "episode", "branch_id": "branch", "attempt": "try", "env_id": "env", "task_id": "task",
          "n_turns": "turns", "n_tokens": "tokens", "n_trainable": "trained", "policy_version_min": "policy",
          "policy_version_max": "newest", "t_stored": "stored (UTC)", "group_id": "group", "stop_reason": "stop"}


def _words(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


@verb(app, lists=True)
def ls(
    out: Out, store: Store, where: Where = None,
    sort: Annotated[str, typer.Option(help="Column to sort by; -COLUMN for the largest first.")] = "t_stored",
    limit: Annotated[int | None, typer.Option(min=0, help="Rows to show, the last ones; on a terminal 50.")] = None,
    columns: Annotated[str | None, typer.Option(metavar="A,B,...", help="Columns to show.")] = None,
    groups: Annotated[bool, typer.Option("--groups", help="One line per group of rollouts.")] = False,
) -> None:
    """List branches, the newest last."""
    from agentsdpo.replay.cli import summary

    table = existing(store).snapshot().scalars(where)
    if groups:
        _list_groups(out, store, table, sort, limit)
        return
    name = summary.column(sort.removeprefix("-"), table)
    order = "descending" if sort.startswith("-") else "ascending"
    table = table.sort_by([(name, order), ("episode_id", "ascending"), ("branch_id", "ascending")])
    wanted = [summary.column(word, table) for word in _words(columns)]
    shown = table.slice(*_part(out, len(table), limit, order == "descending", "branches"))
    rows = shown.select(wanted).to_pylist() if wanted else shown.to_pylist()
    out.answer({"store": store, "total": len(table), "branches": rows}, lambda: _print_rows(
        out, wanted, shown.to_pylist()), lines="branches")


def _part(out: Out, total: int, limit: int | None, first: bool, of: str) -> tuple[int, int]:
    """Where the rows to show begin and how many they are: the first or the last of all."""
    most = min(total, limit if limit is not None else 50 if out.tty else total)
    if most < total:
        out.note(f"{most} of {total} {of}; more with --limit {total}")
    return (0 if first else total - most), most


def _print_rows(out: Out, columns: list[str], rows: list[Json]) -> None:
    """Rows as a table; on a terminal ids are as short as they can be, and columns that say nothing are left out."""
    wanted = columns or list(_COLUMNS)
    if out.tty:
        n = _unique([row["episode_id"] for row in rows])
        if not columns:
            wanted = [name for name in wanted if not _dull(name, rows)]
        rows = [{**row, "episode_id": row["episode_id"][:n], "t_stored": f"{row['t_stored']:%m-%d %H:%M}"}
                for row in rows]
    out.table([_HEADS.get(name, name) for name in wanted], [[row[name] for name in wanted] for row in rows])


def _dull(name: str, rows: list[Json]) -> bool:
    """Whether a column of a listing tells nothing."""
    if name == "env_id":
        return len({row[name] for row in rows}) < 2
    if name == "policy_version_max":
        return all(row[name] == row["policy_version_min"] for row in rows)
    return name in _DULL and all(row[name] == _DULL[name] for row in rows)


def _unique(ids: list[str]) -> int:
    """Characters at which all different ids differ, at least 8."""
    different = set(ids)
    return next((n for n in range(8, 36) if len({one[:n] for one in different}) == len(different)), 36)


def _list_groups(out: Out, store: str, table: "pa.Table", sort: str, limit: int | None) -> None:
    """One line per group: members, size that was planned, rewards."""
    from agentsdpo.replay.cli import summary

    rows, newest = [], {}
    for key, stored in zip(table.column("group_id").to_pylist(), table.column("t_stored").to_pylist(), strict=True):
        newest[key] = max(newest.get(key, stored), stored)
    for each in summary.grouped(table, ["group_id", "group_size"]):
        rows.append({**{name: each[name] for name in ("group_id", "group_size", "episodes", "branches", "tokens")},
                     "whole": each["episodes"] >= each["group_size"],
                     **{f"reward_{n}": each["reward"].get(n) for n in ("min", "mean", "max")}})
    total, first = len(rows), sort.startswith("-")
    rows = _sorted_groups(rows, newest, sort.removeprefix("-"), first)
    start, most = _part(out, total, limit, first, "groups")
    rows = rows[start:start + most]
    out.answer({"store": store, "total": total, "groups": rows}, lambda: out.table(
        list(rows[0]) if rows else ["group_id"], [list(row.values()) for row in rows]), lines="groups")


def _sorted_groups(rows: list[Json], newest: Json, name: str, descending: bool) -> list[Json]:
    """Groups in the order of one of their columns, or of when the newest member was stored; nothing known comes last.

    Raises:
        ConfigError: they have no such column.
    """
    if not rows:
        return rows
    name = {"group": "group_id"}.get(name, name)
    if name not in (*rows[0], "t_stored"):
        raise ConfigError(f"groups have no column {name!r} to sort by",
                          fix=f"choose from t_stored, {', '.join(rows[0])}")
    values = {id(row): newest[row["group_id"]] if name == "t_stored" else row[name] for row in rows}
    known = [row for row in rows if values[id(row)] is not None]
    return sorted(known, key=lambda row: values[id(row)], reverse=descending) + [
        row for row in rows if values[id(row)] is None]


@verb(app)
def stats(
    out: Out, store: Store, where: Where = None,
    by: Annotated[str | None, typer.Option(metavar="A,B,...", help="Count for every value of these columns.")] = None,
    current: Annotated[int | None, typer.Option(min=0, metavar="VERSION", help="Count staleness from this policy "
                                                "version.")] = None,
) -> None:
    """Count branches, tokens, bytes, rewards, versions and reasons."""
    from agentsdpo.replay.cli import summary

    view = existing(store).snapshot()
    table = view.scalars(where)
    if by is not None:
        found = summary.grouped(table, _words(by), current)
        out.answer({"store": store, "by": found}, lambda: _print_by(out, found))
        return
    files = summary.segments(view)
    report = {**summary.counts(table, current), "segments": len(files), "streams": len(view.vector),
              "segment_bytes": sum(row.size for row in files.values()), "conflicts": len(view.conflicts)}
    if where is None and report["tokens"]:
        report["bytes_per_token"] = report["segment_bytes"] / report["tokens"]
    out.answer({"store": store, "snapshot": view.id, **report}, lambda: _print_stats(out, report))


def _print_stats(out: Out, report: Json) -> None:
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {_figure(each)}" for key, each in value.items())
        elif name.endswith("bytes"):
            value = size(value)
        lines.append((name.replace("_", " "), value))
    out.table(["what", "value"], lines)


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_by(out: Out, found: list[Json]) -> None:
    """One line per group; spreads as their means."""
    heads = [name for name in (found[0] if found else {}) if not isinstance(found[0][name], dict)]
    means = [name for name in ("reward", "staleness") if found and name in found[0]]
    out.table([*heads, *(f"mean {name}" for name in means)],
              [[*(each[name] for name in heads), *(each[name].get("mean") for name in means)] for each in found])


@verb(app, lists=True)
def schema(out: Out, store: Store) -> None:
    """List the columns with their types, encodings and bytes per token."""
    from agentsdpo.replay.cli import summary

    columns = summary.column_sizes(existing(store).snapshot())
    names = ["column", "type", "encodings", "bytes", "bytes_per_token"]
    out.answer({"store": store, "columns": columns}, lambda: out.table(
        names, [[row[name] for name in names] for row in columns]), lines="columns")


@verb(app)
def show(
    out: Out, store: Store,
    episode: Annotated[str | None, typer.Argument(help="Id, or as much of its beginning as is unique.")] = None,
    last: Annotated[bool, typer.Option("--last", help="The episode that was committed last.")] = False,
    attempt: Annotated[int | None, typer.Option(min=0, help="Of several attempts; the latest when not given.")] = None,
    branch: Annotated[int | None, typer.Option(min=0, help="One branch alone.")] = None,
    tokens: Annotated[str | None, typer.Option(metavar="A:B", help="A table of these tokens, first to before last.")
                      ] = None,
    calls: Annotated[bool, typer.Option("--calls", help="A table of the calls to the engine.")] = False,
    messages: Annotated[bool, typer.Option("--messages", help="The recorded messages instead of the tokens.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The exact text of the tokens and nothing else.")] = False,
    gap: Annotated[bool, typer.Option("--gap", help="Shade by teacher minus student log-prob.")] = False,
    model: Annotated[str | None, typer.Option(help="Folder of the model whose tokenizer is needed.")] = None,
) -> None:
    """Print an episode: the conversation, each sampled token shaded by its log-prob."""
    from agentsdpo.replay.cli import summary, view

    if (episode is None) != last:
        raise ConfigError("give the id of one episode, or --last", fix="ids are listed by: agentsdpo replay ls")
    chosen = [name for name, on in {"--tokens": tokens is not None, "--calls": calls, "--messages": messages,
                                    "--raw": raw}.items() if on]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} exclude each other", fix="choose one")
    opened = existing(store)
    snapshot = opened.snapshot()
    found = view.load(opened, snapshot, summary.newest_episode(snapshot) if last else summary.find_episode(
        snapshot, episode or ""), attempt=attempt, branch=branch, model=model, gap=gap)
    if found.decoder is None and not (messages or calls):
        out.note(f"no tokenizer {found.rows[0].tokenizer_sha256[:12]!r} here: ids are shown; name the model's folder "
                 "with --model")
    wanted = view.window(tokens, found) if tokens is not None else None
    form = "tokens" if wanted else chosen[0][2:] if chosen else "text"
    out.answer({"store": store, **view.document(found, form, wanted)}, lambda: view.render(out, found, form, wanted))
