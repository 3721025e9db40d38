"""What a teacher would think of an episode had it read something else: the recorded hint, another, or none.

The tokens of the episode stay as they were; what changes is the context that the teacher reads them in.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from agentsdpo.config import SEED_MODEL
from agentsdpo.errors import HintError
from agentsdpo.replay.cli.base import existing
from agentsdpo.replay.cli.decode import pieces
from agentsdpo.replay.cli.view import Shown, load
from agentsdpo.runfolder import parsed, read_run
from agentsdpo.show.viewer import Scores
from agentsdpo.show.viewing import Scorer
from agentsdpo.types import Json

RIGHT, OTHER, NONE = "its own hint", "another task's hint", "no hint"
"""The three controls of :func:`hint_rows`."""
_JSON = (("argument", re.compile(r'"(?!name"|arguments"|parameters")([^"]*)"(?=\s*:)')),
         ("value", re.compile(r'(?<=:)\s*"([^"]*)"|(?<=:)\s*(-?\d[\d.]*|true|false|null)')),
         ("tool", re.compile(r'"name":\s*"([^"]*)"')))  # the tool's name is a value as well, and is more than that
_XML = (("argument", re.compile(r"<parameter=([^<>\n]+)>")),
        ("value", re.compile(r"<parameter=[^<>\n]+>\n?((?:(?!<parameter=).)*?)\n?</parameter>", re.DOTALL)),
        ("tool", re.compile(r"<function=([^<>\n]+)>")))
_BARE = re.compile(r"\s*<function=")
_CALL = re.compile(r'<tool_call>(.*?)(?:</tool_call>|$)|(?:\A|\n)[ \t]*(<function=.*?(?:</function>|\Z))|'
                   r'(?:\A|</think>)\s*(?:<\|python_tag\|>\s*)?(\{\s*"name"\s*:.*)', re.DOTALL)
_FRAME = re.compile(r"<\|[^|]*\|>|</?tool_call>|</?think>")


def hint_rows(episodes: Sequence[Shown], scorer: Scorer) -> list[Json]:
    """Every scored token of some episodes under three hints: its own, that of another task, none.

    The other hint is that of the next episode whose hint says something else.

    Returns:
        Rows as :func:`token_rows` makes them, with ``hint`` one of :data:`RIGHT`, :data:`OTHER`, :data:`NONE`.

    Raises:
        HintError: an episode has no hint, or all have the same.
    """
    texts = [hint.words if (hint := one.rows[0].hint) else "" for one in episodes]
    if not all(texts) or len(set(texts)) < 2:
        raise HintError(f"{sum(map(bool, texts))} of {len(texts)} episodes have a hint, {len(set(texts))} different "
                        "ones", fix="give episodes with hints of which at least two differ")
    rows: list[Json] = []
    for i, shown in enumerate(episodes):
        other = next(text for text in (texts[i + 1:] + texts[:i]) if text != texts[i])
        scored, own = scorer.score(shown)
        _, wrong = scorer.score(shown, hint=other)
        for name, scores in ((RIGHT, own), (OTHER, wrong), (NONE, unhinted(own))):
            rows += [{**row, "hint": name} for row in token_rows(scored, scores) if row["gap"] is not None]
    return rows


def unhinted(scores: Sequence[Scores | None]) -> list[Scores | None]:
    """Scores of a teacher without a hint, which is the student: its gap is zero by definition, nothing is computed."""
    return [one and Scores(one.student, one.student, np.zeros_like(one.weight), one.student_top, one.student_top)
            for one in scores]


def token_rows(shown: Shown, scores: Sequence[Scores | None]) -> list[Json]:
    """One row per sampled token.

    Returns:
        ``episode``, ``task``, ``branch``, ``turn``, ``place`` in the turn, ``token`` in the branch, ``text``, ``part``
        (of a tool call: tool, argument, value, syntax; frame; words), ``behaviour``, ``student``, ``teacher``, ``gap``
        in nats, ``weight`` (what the token adds to the step), ``student_best`` and ``teacher_best``, the likeliest
        tokens. What is not known of a token is None.
    """
    rows: list[Json] = []
    for row, known in zip(shown.rows, scores, strict=True):
        about = {"episode": shown.episode.episode_id, "task": shown.episode.task_id, "branch": row.branch.branch_id}
        for call in row.branch.calls:
            texts = _texts(shown, row.branch.token_ids[call.start:call.end].tolist())
            for at, text, part in zip(range(call.start, call.end), texts, parts_of(texts), strict=True):
                place = {"turn": call.turn, "place": at - call.start, "token": at}
                rows.append({**about, **place, "text": text, "part": part,
                             "behaviour": _number(row.branch.logprobs[at]), **_thoughts(shown, known, at)})
    return rows


def _thoughts(shown: Shown, known: Scores | None, at: int) -> Json:
    """What student and teacher think of one token."""
    if known is None or not np.isfinite(known.teacher[at]):
        return dict.fromkeys(("student", "teacher", "gap", "weight", "student_best", "teacher_best"))
    student, teacher = float(known.student[at]), float(known.teacher[at])
    return {"student": student, "teacher": teacher, "gap": teacher - student, "weight": float(known.weight[at]),
            "student_best": _best(shown, known.student_top.get(at, ())),
            "teacher_best": _best(shown, known.teacher_top.get(at, ()))}


def _number(value: np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


def reading(name: str, rows: Sequence[Json]) -> Json:
    """One reading of an episode in numbers: scored tokens, mean and size of the gap, tokens it would put otherwise.

    >>> reading("none", [{"gap": -1.0, "text": "a", "teacher_best": "b"}, {"gap": None}])
    {'reading': 'none', 'tokens': 1, 'gap_mean': -1.0, 'gap_size': 1.0, 'otherwise': 1}
    """
    known = [row for row in rows if row["gap"] is not None]
    gaps = np.array([row["gap"] for row in known] or [np.nan])
    return {"reading": name, "tokens": len(known), "gap_mean": _number(gaps.mean()),
            "gap_size": _number(np.abs(gaps).mean()),
            "otherwise": sum(row["teacher_best"] != row["text"] for row in known)}


def apart(before: Sequence[Json], after: Sequence[Json], key: str = "teacher_best") -> list[Json]:
    """Tokens in whose place two readings hold different ones likeliest, the furthest apart first.

    Args:
        before, after: rows of :func:`token_rows` of one episode.
        key: of ``before``; ``student_best`` with the same rows twice compares the two sides of one reading.

    Returns:
        ``branch``, ``turn``, ``token``, ``written``, ``before`` and ``after`` (likeliest), and ``change``: by how many
        nats the written token's log-prob differs.
    """
    other = {(row["branch"], row["token"]): row for row in after}
    score = key.removesuffix("_best")
    found = []
    for row in before:
        twin = other.get((row["branch"], row["token"]))
        if twin is None or row[key] is None or twin["teacher_best"] is None or row[key] == twin["teacher_best"]:
            continue
        found.append({"branch": row["branch"], "turn": row["turn"], "token": row["token"], "written": row["text"],
                      "before": row[key], "after": twin["teacher_best"], "change": twin["teacher"] - row[score]})
    return sorted(found, key=lambda one: -abs(one["change"]))


def _texts(shown: Shown, ids: Sequence[int]) -> list[str]:
    """Text of each token; one inside a character of several has the text at the first of them."""
    if shown.decoder is None:
        return [f"{token} " for token in ids]
    found = [""] * len(ids)
    for start, _, text in pieces(shown.decoder, ids):
        found[start] = text
    return found


def _best(shown: Shown, top: Sequence[tuple[int, float]]) -> str:
    if not top:
        return ""
    token = max(top, key=lambda one: one[1])[0]
    return shown.decoder.decode([token], skip_special_tokens=False) if shown.decoder else str(token)


def parts_of(texts: Sequence[str]) -> list[str]:
    """Which part of a turn each token belongs to, by the middle of its text.

    >>> parts_of(["<tool_call>", '{"name": "', "file", '_read", ', '"arguments": {"', "path", '": "', "audit", '"}}'])
    ['frame', 'syntax', 'tool', 'tool', 'syntax', 'argument', 'syntax', 'value', 'syntax']
    >>> parts_of(["<tool_call>", "<function=", "read", ">", "<parameter=", "n", ">", "12", "</parameter>"])
    ['frame', 'syntax', 'tool', 'syntax', 'syntax', 'argument', 'syntax', 'value', 'syntax']
    >>> parts_of(["<function=", "read", ">", "</function>", "</tool_call>"])
    ['syntax', 'tool', 'syntax', 'syntax', 'frame']
    >>> parts_of(["I", " will", " read"])
    ['words', 'words', 'words']
    """
    whole = "".join(texts)
    marks = ["words"] * len(whole)
    for found in _CALL.finditer(whole):
        begin, end = found.span(found.lastindex or 1)
        marks[begin:end] = ["syntax"] * (end - begin)
        for part, pattern in _XML if _BARE.match(whole, begin, end) else _JSON:
            for one in pattern.finditer(whole, begin, end):
                start, stop = one.span(one.lastindex or 1)
                marks[start:stop] = [part] * (stop - start)
    for found in _FRAME.finditer(whole):
        marks[found.start():found.end()] = ["frame"] * (found.end() - found.start())
    parts, at = [], 0
    for text in texts:
        parts.append(_majority(marks[at:at + len(text)], parts))
        at += len(text)
    return parts


def _majority(marks: Sequence[str], before: Sequence[str]) -> str:
    """The commonest mark but syntax, which clings to words in many tokenizers; that of the token before if none."""
    if not marks:
        return before[-1] if before else "words"
    counts: Mapping[str, int] = {mark: marks.count(mark) for mark in marks}
    if len(counts) > 1 and counts.get("syntax", 0) < 0.7 * len(marks):
        counts = {mark: count for mark, count in counts.items() if mark != "syntax"}
    return max(counts, key=lambda mark: counts[mark])


def load_episodes(run: Path | str, count: int = 16) -> tuple[list[Shown], str]:
    """Hinted episodes of the oldest policy in the replay store of a run's main arm, and the model its settings name.

    Raises:
        StoreNotFound: the run has no replay store. RunError: its settings are not TOML.
    """
    data = read_run(run)
    places = [place / "replay" for place in (data.path / "arms" / data.main.name, data.path)]
    store = existing(str(next((place for place in places if place.is_dir()), places[-1])))
    view = store.snapshot()
    table = view.scalars().sort_by([(name, "ascending") for name in ("policy_version_max", "task_id")])
    shown = (load(store, view, name) for name in dict.fromkeys(table["episode_id"].to_pylist()))
    found = list(islice((one for one in shown if one.rows[0].hint), count))
    return found, str(parsed(data.main.config or data.config, data.path).get("model", SEED_MODEL))
