"""One episode, ready to be looked at: its rows, its tokenizer, and what the tokens are shaded by."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.text import Text

from agentsdpo.errors import ConfigError, StoreNotFound
from agentsdpo.replay.cli.base import Out, cell, printable, write
from agentsdpo.replay.cli.decode import Decoder, decoder_for, model_folders, pieces
from agentsdpo.replay.cli.shade import GAP, LOGPROB, Segment, Shade, conversation, segments
from agentsdpo.replay.rows import Row
from agentsdpo.replay.snapshot import Snapshot
from agentsdpo.replay.store import ReplayStore
from agentsdpo.types import Call, Episode, Json

_CALL_COLUMNS = ("branch_id", "call_id", "turn", "start", "end", "policy", "finish_reason", "temperature", "top_p",
                 "top_k", "logprob_kind", "logprob", "untrainable_reason")
_WINDOW_HELP = "write first:last, as in --tokens 0:40, -20: or :100"


@dataclass(frozen=True)
class Shown:
    """An episode, or one branch of it.

    Attributes:
        rows: its branches, verified.
        episode: with messages and metadata.
        status: of the episode: sealed, truncated, aborted or salvaged.
        decoder: of its tokenizer; None when that is not at hand.
        values: per branch float32[T], what tokens are shaded by, NaN for none.
        shade: the colours of the values.
    """

    rows: list[Row]
    episode: Episode
    status: str
    decoder: Decoder | None
    values: list[np.ndarray]
    shade: Shade = LOGPROB


def load(store: ReplayStore, view: Snapshot, episode_id: str, *, attempt: int | None = None, branch: int | None = None,
         model: str | None = None, gap: bool = False) -> Shown:
    """Read an episode and find its tokenizer; tokens are shaded by their log-prob, or with ``gap`` by :func:`gaps`.

    Raises:
        StoreNotFound: no such attempt or branch, or no gap is recorded.
        ModelError, TokenizerMismatch: ``model`` is no folder of the model that sampled the tokens.
        CorruptionError: as :meth:`Snapshot.read`.
    """
    keys = [key for key in sorted(view.rows) if key.episode_id == episode_id]
    attempts, branches = sorted({key.attempt for key in keys}), sorted({key.branch_id for key in keys})
    wanted = attempts[-1] if attempt is None else attempt
    chosen = [key for key in keys if key.attempt == wanted and branch in (None, key.branch_id)]
    if not chosen:
        raise StoreNotFound(f"episode {episode_id} has attempts {cell(attempts)} and branches {cell(branches)}, not "
                            f"branch {branch} of attempt {wanted}", fix="name one of these")
    rows = view.read(chosen)
    episode = view.episode(episode_id, wanted)
    folders = model_folders(store.storage.uri, episode.model_id)
    decoder = decoder_for(episode.tokenizer_sha256, folders, model)
    shown = Shown(rows, episode, view.located(chosen[0]).status, decoder, [row.branch.logprobs for row in rows])
    if not gap:
        return shown
    found = [gaps(view, row) for row in rows]
    title = next((title for values, title in found if values is not None), None)
    if title is None:
        raise StoreNotFound(f"no trainer's log-probs are recorded for episode {episode_id}",
                            fix="record them with ReplayStore.add_relogprobs(..., trainer_id='teacher')")
    nothing = [np.full(len(row.branch.token_ids), np.nan, np.float32) for row in rows]
    values = [have if have is not None else none for (have, _), none in zip(found, nothing, strict=True)]
    return replace(shown, values=values, shade=replace(GAP, title=title))


def gaps(view: Snapshot, row: Row) -> tuple[np.ndarray | None, str]:
    """Teacher minus student log-prob per token, float32[T], and what was subtracted from what; None if not recorded.

    The trainers called ``teacher`` and ``student`` are taken at their newest policy version. Without a teacher, any
    trainer stands in for it; without a student, the behaviour policy does.
    """
    found = dict(sorted(view.relogprobs(row.key).items()))
    if not found:
        return None, ""
    teachers = [at for at in found if at[1] == "teacher"] or [at for at in found if at[1] != "student"] or list(found)
    students = [at for at in found if at[1] == "student" and at != teachers[-1]]
    minus = found[students[-1]] if students else row.branch.logprobs
    names = [f"{trainer} at policy {version}" for version, trainer in [teachers[-1], *students[-1:]]]
    return found[teachers[-1]] - minus, f"{names[0]} minus {names[1] if students else 'behaviour'}, in nats"


def window(text: str, shown: Shown) -> tuple[int, int]:
    """First token and the one after the last from ``a:b``; negative numbers count from the end.

    Raises:
        ConfigError: not of this form, or no token lies there.
    """
    longest = max(len(row.branch.token_ids) for row in shown.rows)
    first, colon, last = text.partition(":")
    try:
        start, stop, _ = slice(int(first) if first else None, int(last) if last else None).indices(longest)
    except ValueError as error:
        raise ConfigError(f"--tokens is {text!r}", fix=_WINDOW_HELP) from error
    if not colon or start >= stop:
        raise ConfigError(f"--tokens {text} names no token of {longest}", fix=_WINDOW_HELP)
    return start, stop


# ------------------------------------------------------------------------------------------------------- as JSON


def document(shown: Shown, form: str, wanted: tuple[int, int] | None) -> Json:
    """What ``--json`` prints; ``form`` is text, raw, messages, calls or tokens (of ``wanted``)."""
    first, episode = shown.rows[0], shown.episode
    about: Json = {
        "episode_id": episode.episode_id, "attempt": episode.attempt, "run_id": episode.run_id,
        "env_id": episode.env_id, "task_id": episode.task_id, "group_id": episode.group_id, "status": shown.status,
        "stop_reason": str(episode.stop_reason), "reward": first.reward, "policy_versions": list(_versions(shown)),
        "n_tokens": sum(len(row.branch.token_ids) for row in shown.rows),
        "n_trainable": sum(row.branch.n_trainable for row in shown.rows),
        "model_id": episode.model_id, "tokenizer_sha256": episode.tokenizer_sha256,
        "hint": first.hint.model_dump() if first.hint else None,
        "grade": first.grade.model_dump() if first.grade else None, "metadata": episode.metadata}
    if form == "messages":
        return {"episode": about, "messages": list(episode.messages)}
    if form == "calls":
        return {"episode": about, "calls": _calls(shown)}
    if wanted:
        return {"episode": about, "tokens": _tokens(shown, wanted)}
    return {"episode": about, "branches": [_branch(row, shown, raw=form == "raw") for row in shown.rows]}


def _versions(shown: Shown) -> tuple[int, int]:
    """Oldest and newest policy version over the branches shown; -1 when unknown."""
    known = [row.policy_versions for row in shown.rows if row.policy_versions[0] >= 0]
    return (min(v[0] for v in known), max(v[1] for v in known)) if known else (-1, -1)


def _branch(row: Row, shown: Shown, *, raw: bool) -> Json:
    about: Json = {name: getattr(row.branch, name) for name in (
        "branch_id", "parent_branch_id", "fork_at", "fork_reason")}
    if raw:
        return {**about, "text": _text(row, shown, 0, len(row.branch.token_ids))}
    return {**about, "segments": [_segment(row, shown, each) for each in segments(row.branch)]}


def _segment(row: Row, shown: Shown, segment: Segment) -> Json:
    writer, start, end, call = segment
    found: Json = {"writer": writer, "start": start, "end": end, "text": _text(row, shown, start, end)}
    if shown.decoder is None:
        found["token_ids"] = row.branch.token_ids[start:end].tolist()
    if call:
        found |= {"turn": call.turn, "call_id": call.call_id, "finish_reason": call.finish_reason,
                  "policy_versions": sorted({span.version for span in call.versions}),
                  "logprob": _sum(row, call), "untrainable_reason": call.untrainable_reason}
    return found


def _text(row: Row, shown: Shown, start: int, end: int) -> str | None:
    """Exact text of some tokens, None without a tokenizer."""
    ids = row.branch.token_ids[start:end].tolist()
    return shown.decoder.decode(ids, skip_special_tokens=False) if shown.decoder else None


def _sum(row: Row, call: Call) -> float | None:
    """Log-prob of a whole completion, None when some token of it has none."""
    total = float(row.branch.logprobs[call.start:call.end].sum())
    return total if total == total else None


def _calls(shown: Shown) -> list[Json]:
    return [{"branch_id": row.branch.branch_id, "call_id": call.call_id, "turn": call.turn, "start": call.start,
             "end": call.end, "policy": sorted({span.version for span in call.versions}),
             "finish_reason": call.finish_reason, **call.sampling.model_dump(), "logprob_kind": call.logprob_kind,
             "logprob": _sum(row, call), "untrainable_reason": call.untrainable_reason}
            for row in shown.rows for call in row.branch.calls]


def _tokens(shown: Shown, wanted: tuple[int, int]) -> list[Json]:
    """One entry per token; a token inside a character of several has the text of all of them at the first."""
    found, name = [], "logprob" if shown.shade is LOGPROB else "gap"
    for row, values in zip(shown.rows, shown.values, strict=True):
        branch, (start, stop) = row.branch, wanted
        ids, turns = branch.token_ids[start:stop].tolist(), {at: c.turn for c in branch.calls for at in
                                                             range(c.start, c.end)}
        texts = {start + a: text for a, _, text in pieces(shown.decoder, ids)} if shown.decoder else {}
        found += [{"branch_id": branch.branch_id, "token": at, "id": token, "kind": int(branch.token_kind[at]),
                   "text": texts.get(at, "" if texts else None), name: float(values[at]),
                   "turn": turns.get(at)} for at, token in enumerate(ids, start)]
    return found


# ------------------------------------------------------------------------------------------------------- as text


def render(out: Out, shown: Shown, form: str, wanted: tuple[int, int] | None) -> None:
    """Print what people read; the forms are those of :func:`document`."""
    if form == "raw":
        _print_raw(out, shown)
    elif form == "calls":
        _table(out, _CALL_COLUMNS, _calls(shown))
    elif wanted:
        rows = _tokens(shown, wanted)
        _table(out, tuple(rows[0]), [{**row, "text": row["text"] and repr(row["text"])[1:-1]} for row in rows])
    elif form == "messages":
        out.say(_header(shown))
        out.say(_messages(shown.episode, _width(out)))
    else:
        out.say(_header(shown))
        for row, values in zip(shown.rows, shown.values, strict=True):
            if len(shown.rows) > 1:
                out.say(_fork(row))
            out.say(conversation(row.branch, values, shown.decoder, shown.shade, _width(out)))
        if out.colour:
            out.say(shown.shade.legend())


def _width(out: Out) -> int:
    return min(out.console().width, 100) if out.tty else 72


def _print_raw(out: Out, shown: Shown) -> None:
    """The exact text; what would steer a terminal is made harmless there and nowhere else."""
    for row in shown.rows:
        text = _text(row, shown, 0, len(row.branch.token_ids))
        text = text if text is not None else " ".join(map(str, row.branch.token_ids.tolist()))
        write((printable(text) if out.tty else text) + "\n")


def _table(out: Out, columns: tuple[str, ...], rows: list[Json]) -> None:
    out.table([name.replace("_", " ") for name in columns], [[row[name] for name in columns] for row in rows])


def _header(shown: Shown) -> Text:
    """Who, what, how it ended, what it was graded, what the teacher is told."""
    first, episode = shown.rows[0], shown.episode
    low, high = _versions(shown)
    policy = "policy unknown" if low < 0 else f"policy {low}" if low == high else f"policies {low} to {high}"
    reward = "unscored" if first.reward is None else f"reward {first.reward:.4g}"
    total = sum(len(row.branch.token_ids) for row in shown.rows)
    trained = sum(row.branch.n_trainable for row in shown.rows)
    text = Text(f"episode {episode.episode_id}", style="bold")
    text.append(f", attempt {episode.attempt}\n" if episode.attempt else "\n", style="not bold")
    lines = [f"{episode.env_id} / {episode.task_id}",
             " · ".join([f"{shown.status} ({episode.stop_reason})", reward, policy,
                         f"{total} tokens, {trained} trained", episode.model_id, *_took(episode)])]
    if first.grade:
        lines.append("criteria: " + ", ".join(_criterion(each) for each in first.grade.results))
        lines += [f"feedback: {first.grade.feedback}"] * bool(first.grade.feedback)
    if first.hint:
        who = f"({first.hint.source}, by {first.hint.author})"
        lines += [f"hint {who}: {first.hint.text}"] * bool(first.hint.text)
        lines += [f"hint of {turns} {who}: {text}" for turns, text in first.hint.told]
    return text.append(printable("\n".join(lines) + "\n"), style="not bold")


def _took(episode: Episode) -> list[str]:
    """From its first request to its last answer; [] where no times are kept."""
    spans = [(start, end) for start, end in (branch.times for branch in episode.branches) if start and end]
    if not spans:
        return []
    start, end = min(start for start, _ in spans), max(end for _, end in spans)
    return [f"{(end - start).total_seconds():.1f} s from {start:%Y-%m-%d %H:%M:%S} UTC"]


def _criterion(result: Any) -> str:
    return f"{result.id} {cell(result.score) if result.status == 'ok' else result.status}"


def _fork(row: Row) -> Text:
    branch = row.branch
    words = f"branch {branch.branch_id}"
    if branch.parent_branch_id is not None:
        words += f", from branch {branch.parent_branch_id} at token {branch.fork_at} ({branch.fork_reason})"
    return Text(f"\n{words}", style="bold magenta")


def _messages(episode: Episode, width: int) -> Text:
    """The recorded messages: role, text, tool calls."""
    if not episode.messages:
        return Text("no messages were recorded", style="dim")
    parts = []
    for message in episode.messages:
        role = printable(str(message.get("role", "?"))).replace("\n", " ")
        line = f"── {role} "
        parts.append(Text(line + "─" * max(width - len(line), 2), style="bold" if role == "assistant" else "cyan"))
        content = message.get("content") or ""
        said = [content if isinstance(content, str) else cell(content)]
        said += [_call_text(call.get("function", {})) for call in message.get("tool_calls") or []]
        parts.append(Text(printable("\n".join(filter(None, said)))))
    return Text("\n").join(parts)


def _call_text(function: Json) -> str:
    """A tool call as one would write it."""
    arguments = function.get("arguments")
    inner = ", ".join(f"{k}={v!r}" for k, v in arguments.items()) if isinstance(arguments, dict) else str(arguments)
    return f"→ {function.get('name')}({inner})"
