"""Verbs that keep a store in order. Those that hide, move or delete say what they would do until they get ``--yes``."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentsdpo.errors import ConfigError, StoreNotFound
from agentsdpo.replay.cli.base import SIZES, TIMES, Out, Sole, Store, Where, Yes, amount, existing, size, verb

if TYPE_CHECKING:
    from agentsdpo.replay.ids import Key
    from agentsdpo.replay.store import ReplayStore

app = typer.Typer(rich_markup_mode=None)
Reason = Annotated[str, typer.Option(help="Why; kept in the log for people.")]


# ------------------------------------------------------------------------------------------------- hide and show


@verb(app)
def evict(
    out: Out, store: Store, where: Where = None,
    max_staleness: Annotated[int | None, typer.Option(min=0, help="Policy versions a group may be old.")] = None,
    current: Annotated[int | None, typer.Option(min=0, metavar="VERSION", help="The learner's policy version; the "
                                                "newest in the store when not given.")] = None,
    max_age: Annotated[str | None, typer.Option(metavar="AGE", help="As in 90min, 12h, 30d.")] = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="As in 500MB; the oldest policies go first.")
                         ] = None,
    max_uses: Annotated[int | None, typer.Option(min=1, help="Draws; needs --index.")] = None,
    index: Annotated[Path | None, typer.Option(metavar="FILE", help="The learner's side index.")] = None,
    reason: Reason = "", yes: Yes = False, sole_maintainer: Sole = False,
) -> None:
    """Hide branches beyond a bound, whole groups; nothing is deleted before gc."""
    from agentsdpo.replay.cli.choose import Bounds, superfluous

    opened = existing(store)
    view = opened.snapshot()
    among = view.keys(where)
    if all(bound is None for bound in (max_staleness, max_age, max_bytes, max_uses, where)):
        raise ConfigError("no bound is given: this would hide everything", fix="give --max-staleness, --max-age, "
                          "--max-bytes, --max-uses or --where")
    if (max_uses is None) != (index is None):
        raise ConfigError("--max-uses and --index belong together", fix="name the file the learner keeps its uses in")
    before = int((time.time() - amount(max_age, "--max-age", TIMES)) * 1e6) if max_age else None
    most = int(amount(max_bytes, "--max-bytes", SIZES)) if max_bytes else None
    bounds = Bounds(max_staleness, current, before, most, max_uses, _uses(index, opened) if index else None)
    alone = all(bound is None for bound in (max_staleness, before, most, max_uses))
    _evict(out, store, opened, among if alone else superfluous(view, bounds, among), reason or _words(bounds, where),
           yes, sole_maintainer)


def _uses(index: Path, opened: "ReplayStore") -> "dict[Key, int]":
    """Draws per row, from a side index that is there."""
    from agentsdpo.replay.sampling.index import SideIndex

    if not index.is_file():
        raise StoreNotFound(f"there is no side index {index}", fix="the learner writes it; see SideIndex")
    return {key: use.uses for key, use in SideIndex(index, opened.about["store_id"], make=False).read().items()}


def _words(bounds: Any, where: str | None) -> str:
    """The bounds as a reason."""
    said = [f"{name} {getattr(bounds, name)}" for name in ("max_staleness", "current", "before_us", "max_bytes",
                                                           "max_uses") if getattr(bounds, name) is not None]
    return ", ".join([*said, *([f"where {where}"] if where else [])])


def _evict(out: Out, store: str, opened: "ReplayStore", keys: "list[Key]", reason: str, yes: bool,
           sole: bool) -> None:
    """Hide these rows, or say which would be."""
    from agentsdpo.replay import evict as hide

    rows = opened.snapshot().rows
    report = hide(opened, keys, reason=reason, dry_run=not yes, sole_maintainer=sole)
    tokens = sum(rows[key].n_tokens for key in report.keys if key in rows)
    episodes = {key.episode_id for key in report.keys}
    words = (f"{len(report.keys)} branches of {len(episodes)} episodes, {tokens} tokens; "
             f"{len(rows.keys() - set(report.keys))} branches")
    out.finish(yes, {"store": store, "reason": reason, "tokens": tokens, **report.as_json()},
               f"hid {words} are left", f"would hide {words} would be left")


@verb(app)
def rm(
    out: Out, store: Store, episodes: Annotated[list[str], typer.Argument(metavar="EPISODE...", help="Ids, or their "
                                                "beginnings.")],
    reason: Reason = "removed by hand", yes: Yes = False, sole_maintainer: Sole = False,
) -> None:
    """Hide episodes and the rest of their groups: evict with a reason."""
    from agentsdpo.replay.cli.summary import find_episode

    opened = existing(store)
    view = opened.snapshot()
    names = {find_episode(view, prefix, view.conflicts) for prefix in episodes}
    _evict(out, store, opened, [key for key in sorted({*view.rows, *view.conflicts}) if key.episode_id in names],
           reason, yes, sole_maintainer)


@verb(app)
def unevict(
    out: Out, store: Store,
    episodes: Annotated[list[str] | None, typer.Argument(metavar="[EPISODE...]", help="Ids, or their beginnings; all "
                                                         "hidden ones when not given.")] = None,
    yes: Yes = False, sole_maintainer: Sole = False,
) -> None:
    """Show hidden branches again, as long as gc has not named their files."""
    from agentsdpo.replay import unevict as reveal

    opened = existing(store)
    fold = opened.fold()
    wanted = tuple(episodes or ("",))
    keys = [key for key in sorted(fold.evicted) if key.episode_id.startswith(wanted)]
    if episodes and not keys:
        raise StoreNotFound(f"none of {len(fold.evicted)} hidden branches is of {', '.join(episodes)}",
                            fix="see what was hidden with: agentsdpo replay log")
    if not episodes:
        keys = [key for key in keys if fold.rows[key].path not in fold.gone]
    report = reveal(opened, keys, dry_run=not yes, sole_maintainer=sole_maintainer)
    words = f"{len(report.keys)} branches of {len({key.episode_id for key in report.keys})} episodes"
    out.finish(yes, {"store": store, **report.as_json()}, f"show {words} again", f"would show {words} again")


# ------------------------------------------------------------------------------------------------------- files


@verb(app)
def gc(
    out: Out, store: Store,
    grace: Annotated[str, typer.Option(metavar="AGE", help="Between naming a file and deleting it.")] = "24h",
    yes: Yes = False, sole_maintainer: Sole = False,
) -> None:
    """Name the files nobody needs; delete those named longer ago than the grace."""
    from agentsdpo.replay import gc as collect

    report = collect(existing(store), grace_s=amount(grace, "--grace", TIMES), dry_run=not yes,
                     sole_maintainer=sole_maintainer)
    words = (f"name {len(report.named)} files, delete {len(report.deleted)} ({size(report.freed_bytes)}), "
             f"leave {len(report.pinned)} that are pinned")
    out.finish(yes, {"store": store, **report.as_json()}, f"done: {words}", f"would {words}")


@verb(app)
def snapshot(out: Out, store: Store, anew: Annotated[bool, typer.Option(
        "--anew", help="Read the whole log, where a folded snapshot says that it was longer.")] = False) -> None:
    """Fold the log into one file, so that the store opens fast."""
    from agentsdpo.replay import fold

    opened = existing(store)
    path = fold(opened, anew=anew)
    view = opened.snapshot()
    out.answer({"store": store, "path": path, "snapshot": view.id, "branches": len(view)},
               lambda: f"{store}/{path}: {len(view)} branches, snapshot {view.id[:16]}")


# -------------------------------------------------------------------------------------------------------- pins


@verb(app, lists=True)
def pin(
    out: Out, store: Store,
    reader: Annotated[str | None, typer.Argument(help="Who needs the store as it is now; without it, pins are listed.")
                      ] = None,
    ttl: Annotated[str, typer.Option(metavar="AGE", help="Until the pin lapses.")] = "1h",
) -> None:
    """Keep gc from what a reader sees now, or list the pins."""
    from agentsdpo.replay.upkeep.pinned import pin as hold
    from agentsdpo.replay.upkeep.pinned import pins, standing

    opened = existing(store)
    if reader is not None:
        hold(opened, reader, opened.snapshot(), ttl_s=amount(ttl, "--ttl", TIMES))
    lasting = {each.reader for each in standing(opened)}
    found = [{"reader": each.reader, "ttl_s": each.ttl_s, "state": each.state, "standing": each.reader in lasting}
             for each in pins(opened) if reader in (None, each.reader)]
    out.answer({"store": store, "pins": found}, lambda: out.table(
        ["reader", "ttl_s", "standing"], [[row["reader"], row["ttl_s"], row["standing"]] for row in found]),
        lines="pins")


@verb(app)
def unpin(out: Out, store: Store, reader: Annotated[str, typer.Argument()]) -> None:
    """Let go of a reader's pin."""
    from agentsdpo.replay.upkeep.pinned import pins
    from agentsdpo.replay.upkeep.pinned import unpin as release

    opened = existing(store)
    names = [info.path.rpartition("/")[2].removesuffix(".json") for info in opened.storage.list("pins")]
    if reader not in names:
        raise StoreNotFound(f"there is no pin of {reader!r} among {len(names)}", fix="list them with: agentsdpo "
                            "replay pin STORE")
    release(opened, reader)
    out.answer({"store": store, "reader": reader, "left": [each.reader for each in pins(opened)]},
               lambda: f"the pin of {reader} is gone")


# ------------------------------------------------------------------------------------------------------ labels


@verb(app)
def label(
    out: Out, store: Store,
    text: Annotated[str | None, typer.Argument(help="The label for what --where chooses.")] = None, where: Where = None,
    source: Annotated[Path | None, typer.Option("--from", metavar="FILE", help="JSON lines; - is stdin.")] = None,
    kind: Annotated[str, typer.Option(help="What the lines of --from hold: label, reward or hint.")] = "label",
    author: Annotated[str, typer.Option(help="Who says so, where a line does not.")] = "",
) -> None:
    """Add labels, rewards or hints that came late; stored rows stay as they are."""
    from agentsdpo.replay.cli import notes

    if (text is None) == (source is None) or (where is None) == (text is not None) or kind not in notes.KINDS:
        raise ConfigError("what to add is not clear", fix="give a label and --where EXPR, or --from FILE with --kind "
                          f"{', '.join(notes.KINDS)}")
    opened = existing(store)
    values: dict[Any, Any] = dict.fromkeys(opened.snapshot().keys(where), text) if text is not None else notes.read(
        sys.stdin if str(source) == "-" else _lines(source), kind, author)
    if kind == "hint":
        opened.add_hints(values)
    elif kind == "reward":
        opened.add_rewards(values, author=author)
    else:
        opened.add_labels(values, author=author)
    opened.close()
    out.answer({"store": store, "kind": kind, "added": len(values)}, lambda: f"added {len(values)} {kind}s")


def _lines(source: Path | None) -> list[str]:
    try:
        return (source or Path()).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreNotFound(f"{source} cannot be read: {error}", fix="name a file of JSON lines") from error
