"""The seeded data an environment is made of: clients, sheets, mails, chat, calendar, policy notes.

A world is a pure function of its seed. A task mounts the part it needs into one JSON-able state dict::

    files{path: {row: {col: [value, unit]}}}   docs{path: text}   mail[{id, sender, subject, body}] newest first
    chat{channel: [text]}   calendar{day: [title]}   notes{key: text}   sent[{to, text}]   submitted: str | None

Nothing here reads a house rule: the initial state of (world_seed, task_seed) is the same for every firm.
"""

import hashlib
import json
from typing import Any

from agentsdpo.envs.desk import text

State = dict[str, Any]
CLIENTS_PER_WORLD = 64
MAIL_PAGE, FILE_PAGE, ROW_PAGE = 5, 10, 12


def canonical(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces; the state holds no floats."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def state_hash(state: State) -> str:
    """sha256 of the canonical state."""
    return hashlib.sha256(canonical(state)).hexdigest()


class Canonical:
    """:func:`canonical` of a state that changes one file at a time: what stayed as it was is not encoded again.

    >>> state = {"files": {"a/b": {"tax": {"q1-1": ["1", "usd"]}}}, "mail": [], "chat": {}, "docs": {}, "notes": {}}
    >>> Canonical(state).of(state) == canonical(state)
    True
    """

    _FIXED = ("chat", "docs", "mail")
    """Parts that no tool writes."""

    def __init__(self, state: State) -> None:
        self._files = {path: canonical(rows) for path, rows in state["files"].items()}
        self._fixed = {key: canonical(state[key]) for key in self._FIXED}

    def of(self, state: State, changed: str | None = None) -> bytes:
        """Canonical JSON of the state, in which the file ``changed`` may differ from last time."""
        if changed is not None:
            self._files[changed] = canonical(state["files"][changed])
        files = b",".join(canonical(path) + b":" + self._files[path] for path in sorted(self._files))
        parts = {**{key: canonical(value) for key, value in state.items() if key not in ("files", *self._FIXED)},
                 **self._fixed, "files": b"{" + files + b"}"}
        return b"{" + b",".join(canonical(key) + b":" + parts[key] for key in sorted(parts)) + b"}"


def clients_of(world_seed: int, *, held_out: bool) -> list[str]:
    """The clients of one world, distinct, from the seen or the held-out pool."""
    pool = text.names(held_out=held_out)
    start, stride = text.digest("clients", world_seed) % len(pool), 1 + text.digest("stride", world_seed) % 96
    return list(dict.fromkeys(pool[(start + i * stride) % len(pool)] for i in range(CLIENTS_PER_WORLD)))


def figures(world_seed: int, preset: str, client: str, kind: str, period: str) -> dict[str, int]:
    """What each sheet says, in usd: three digits in ``desk-mini``, four in ``desk``; sheets always disagree."""
    low = 100 if preset == "desk-mini" else 1000
    first = text.digest("figure", world_seed, client, kind, period) % (9 * low)
    shift = 1 + text.digest("sheets", world_seed, client, kind, period) % (2 * low)
    return {source: low + (first + i * shift) % (9 * low) for i, source in enumerate(text.SOURCES)}


def rate(world_seed: int, year: str) -> str:
    """Euro per dollar of a year, as a decimal string between 0.80 and 0.99."""
    return f"0.{80 + text.digest('rate', world_seed, year) % 20}"


def other_than(options: tuple[str, ...], known: str, *parts: Any) -> str:
    """An option that is not ``known``."""
    return text.pick([o for o in options if o != known], *parts)


def sheets(meta: dict[str, Any], client: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Rows of a client's sheet in each source: the kinds asked for, and ``meta["rows"]`` distractor rows, in an order
    of their own."""
    world, preset, period = meta["world_seed"], meta["preset"], meta["period"]
    cells = [(kind, period) for kind in meta["kinds"]] + _distractor_cells(meta, client)[:meta["rows"]]
    cells = sorted(dict.fromkeys(cells), key=lambda cell: text.digest("order", meta["seed"], client, *cell))
    found: dict[str, dict[str, dict[str, list[str]]]] = {source: {} for source in text.SOURCES}
    for kind, when in cells:
        for source, value in figures(world, preset, client, kind, when).items():
            found[source].setdefault(kind, {})[when] = [str(value), "usd"]
    return found


def _distractor_cells(meta: dict[str, Any], client: str) -> list[tuple[str, str]]:
    """First another kind of the same period, or the same kind of a near period; then other kinds."""
    world, period, seed = meta["world_seed"], meta["period"], meta["seed"]
    if text.digest("line", seed, client) % 2:
        first = (other_than(text.KINDS, meta["kinds"][0], "row", world, client), period)
    else:
        near = f"q{1 + (int(period[1]) + text.digest('near', seed, client) % 3) % 4}-{text.year_of(period)}"
        first = (meta["kinds"][0], near)
    return [first, *((text.pick(text.KINDS, "extra", world, client, i), period) for i in range(meta["rows"] - 1))]


def corrections(meta: dict[str, Any]) -> list[dict[str, str]]:
    """Correction mails, newest first: about half of the clients have one, a third of those a superseded one too."""
    mails = []
    for kind in meta["kinds"]:
        for client in meta["clients"]:
            draw = text.digest("correction", meta["seed"], client, kind)
            for version in range((draw % 2) + (1 if draw % 6 == 1 else 0)):
                low = 100 if meta["preset"] == "desk-mini" else 1000
                value = low + text.digest("corrected", meta["seed"], client, kind, version) % (9 * low)
                mails.append({"sender": client, "subject": f"correction {kind} @{client}",
                              "body": f"{kind} of @{client} for {meta['period']} is {value} usd"})
    return mails


def distractors(meta: dict[str, Any]) -> list[dict[str, str]]:
    """Mails that ask for nothing."""
    world = meta["world_seed"]
    return [{"sender": text.pick(text.PEOPLE, "from", world, i), "body": "see you there",
             "subject": f"{text.pick(('lunch', 'parking', 'holiday', 'printer'), 'subject', world, i)}"}
            for i in range(meta["distractors"])]


def excluded(meta: dict[str, Any]) -> list[str]:
    """Clients the policy note takes out of a roll-up: about one in four, never all."""
    out = [c for c in meta["clients"] if text.digest("except", meta["world_seed"], c) % 4 == 0]
    return out if len(out) < len(meta["clients"]) else out[1:]


def policies(meta: dict[str, Any]) -> dict[str, str]:
    """Visible rules: one note per kind, and the exchange rates."""
    out = text.listing(excluded(meta)) if meta["family"] in ("rollup", "close") else ""
    notes = {f"policy/{kind}": f"{kind}: leave out {out or 'nobody'}" for kind in meta["kinds"]}
    year = text.year_of(meta["period"])
    notes["policy/rates"] = f"year {year} eur {rate(meta['world_seed'], year)}"
    return notes


def build(meta: dict[str, Any]) -> State:
    """Initial state of a task (see the module docstring). ``meta`` is ``Task.metadata``; no rule enters."""
    held = meta["clients"] + [c for c in clients_of(meta["world_seed"], held_out=meta["held_out"])
                              if c not in meta["clients"]][:2]
    rows = {client: sheets(meta, client) for client in held}
    files = {f"{source}/{client}": rows[client][source] for source in text.SOURCES for client in held}
    mails = corrections(meta) if meta["family"] in ("correct", "rollup", "close") else []
    mails = sorted(mails + distractors(meta), key=lambda m: text.digest("mail", meta["seed"], m["body"], m["subject"]))
    for i, mail in enumerate(mails):
        mail["id"] = f"m{len(mails) - i}"
    day = text.pick(text.DAYS, "day", meta["world_seed"], meta["seed"])
    return {"files": files, "docs": policies(meta), "mail": mails,
            "chat": {"close": [f"close {meta['period']} on {day}"]}, "calendar": {d: [] for d in text.DAYS},
            "notes": {}, "sent": [], "submitted": None}
