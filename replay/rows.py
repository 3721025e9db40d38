"""Episodes to rows of the store and back."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from agentsdpo.errors import RowError
from agentsdpo.replay.canonical import (
    Columns,
    Nested,
    canonical_json,
    canonical_nan,
    content_sha256,
    to_json,
    tokens_sha256,
)
from agentsdpo.replay.ids import Key
from agentsdpo.replay.schema import CALL, SCHEMA, VERSION_SPAN, conform
from agentsdpo.types import Branch, Call, Episode, Grade, Hint, Json, Sampling, StopReason, VersionSpan

LOGPROB_KINDS = ("processed", "tempered", "raw", "unknown", "none")
"""From the strongest to the weakest; see ``FORMAT.md``."""
_UNSCORED = (StopReason.ENGINE_ERROR,)
_WHOLE = (StopReason.COMPLETED, StopReason.PARSE_ERROR)
_KIND_REASON = {"tempered": "kind_tempered_filtered", "raw": "kind_raw", "unknown": "kind_unknown",
                "none": "no_logprobs"}


@dataclass(frozen=True, slots=True)
class Row:
    """One branch as the learner takes it from the store. ``branch`` arrays are read-only.

    ``hint``, ``reward`` and ``grade`` are the newest overlay or, without one, those the episode was appended with;
    ``label`` is the newest overlay. ``policy_versions`` are the oldest and the newest version that sampled a token
    here, -1 where unknown.
    """

    key: Key
    branch: Branch
    task_id: str
    env_id: str
    run_id: str
    group_id: str
    stop_reason: StopReason
    grade: Grade | None
    hint: Hint | None
    reward: float | None
    policy_versions: tuple[int, int]
    tokenizer_sha256: str
    chat_template_sha256: str
    train_allowed: bool
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The token columns of one branch, read-only: ids int32[T], kinds uint8[T], behaviour log-probs float32[T].

    ``kept_ids`` and ``kept_counts`` are int32, None where nothing was cut from the distribution.
    """

    key: Key
    token_ids: np.ndarray
    token_kind: np.ndarray
    logprobs: np.ndarray
    kept_ids: np.ndarray | None
    kept_counts: np.ndarray | None


# ------------------------------------------------------------------------------------------------------- writing


def to_rows(episodes: Sequence[Episode], writer_id: str = "", *, salvaged: bool = False) -> pa.Table:
    """One row per branch, in the order given, with both hashes; NaN log-probs become the canonical NaN.

    Args:
        episodes: any number of episodes.
        writer_id: of the log stream that will commit them.
        salvaged: the status of every row, instead of one that follows from the stop reason.

    Raises:
        RowError: a text, number or metadata value that cannot be stored (see :mod:`agentsdpo.replay.rules` for the
            checks that come before).
    """
    stamps = {"writer_id": writer_id, **({"status": "salvaged"} if salvaged else {})}
    records = [_record(episode, branch) | stamps for episode in episodes for branch in episode.branches]
    try:
        columns = [_column(field, records) for field in SCHEMA]
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError) as error:
        raise RowError(f"a value does not fit its column: {error}",
                       fix="keep seeds below 2**63, other integers below 2**31, text valid Unicode") from error
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _record(episode: Episode, branch: Branch) -> Json:
    """All columns of one row as Python values; what is missing is null."""
    first, calls = branch is episode.branches[0], call_columns(branch)
    low, high = branch.policy_versions
    count = np.bincount(branch.token_kind, minlength=6)
    logprobs, kind = canonical_nan(branch.logprobs), _weakest(branch)
    try:
        tokens, content = _hashes(branch, logprobs, calls)
    except (OverflowError, struct.error, ValueError) as error:
        raise RowError(f"a call of episode {episode.episode_id} cannot be stored: {error}",
                       fix="text must be valid Unicode, hashes 64 hex digits") from error
    return {
        **{name: getattr(episode, name) for name in _EPISODE_FIELDS},
        "branch_id": branch.branch_id, "parent_branch_id": branch.parent_branch_id, "fork_at": branch.fork_at,
        "fork_reason": branch.fork_reason,
        "status": _status(episode.stop_reason), "stop_reason": str(episode.stop_reason),
        "trainable": bool(count[1]), "untrainable_reason": _untrainable(episode, branch, count),
        "policy_version_min": low, "policy_version_max": high, "policy_version_start": _first_version(branch),
        "logprob_kind": kind, "kept_set": _kept_set(branch),
        "reward": episode.reward, "rewards_json": to_json(episode.grade.model_dump()) if episode.grade else None,
        "reward_status": "none" if episode.reward is None else "final",
        "n_tokens": len(branch.token_ids), "n_sampled": int(count[[1, 4, 5]].sum()), "n_trainable": int(count[1]),
        "t_start": branch.times[0], "t_end": branch.times[1],
        "n_calls": len(branch.calls), "n_turns": len({call.turn for call in branch.calls}),
        "token_ids": branch.token_ids, "token_kind": branch.token_kind, "logprobs": logprobs, "calls": calls,
        "kept_ids": branch.kept_ids, "kept_counts": branch.kept_counts,
        "messages_json": to_json(list(episode.messages)) if first and episode.messages else None,
        "tools_json": to_json(list(episode.tools)) if first and episode.tools else None,
        "extra": canonical_json(_extra(episode, first)).decode(), "tokens_sha256": tokens, "content_sha256": content}


_EPISODE_FIELDS = ("episode_id", "attempt", "run_id", "env_id", "task_id", "group_id", "group_size", "train_allowed",
                   "model_id", "tokenizer_sha256", "chat_template_sha256", "engine")


def _hashes(branch: Branch, logprobs: np.ndarray, calls: Columns) -> tuple[bytes, bytes]:
    """``tokens_sha256`` and ``content_sha256`` of a branch with canonical log-probs."""
    tokens = tokens_sha256(branch.token_ids, branch.token_kind, logprobs, branch.kept_ids, branch.kept_counts)
    return tokens, content_sha256(tokens, calls, len(branch.calls))


def content_of(branch: Branch) -> str:
    """``content_sha256`` that a branch will have in the store, in hex; it is known to fit there."""
    return _hashes(branch, canonical_nan(branch.logprobs), call_columns(branch))[1].hex()


def _extra(episode: Episode, first: bool) -> Json:
    """What has no column: hint and vocabulary size on every row, metadata on the first."""
    extra: Json = {"vocab_size": episode.vocab_size}
    if episode.hint is not None:
        extra["hint"] = episode.hint.model_dump()
    if first and episode.metadata:
        extra["metadata"] = episode.metadata
    return extra


def call_columns(branch: Branch) -> Columns:
    """The calls of a branch, field by field; fields that are not here are null."""
    calls, samplings = branch.calls, [call.sampling for call in branch.calls]
    spans = [span for call in calls for span in call.versions]
    columns: Columns = {name: [getattr(call, name) for call in calls] for name in _PLAIN_CALL}
    columns |= {name: [getattr(sampling, name) for sampling in samplings] for name in Sampling.model_fields}
    columns["prompt_sha256"] = [bytes.fromhex(c.prompt_sha256) if c.prompt_sha256 else None for c in calls]
    columns["lp_exact"] = [_exact(call) for call in calls]
    columns["kept_set"] = [_call_kept_set(call, branch) for call in calls]
    columns["version_source"] = ["unknown" if _unknown(call) else "engine_span" for call in calls]
    columns["versions"] = Nested([len(call.versions) for call in calls],
                                 {name: [getattr(span, name) for span in spans] for name in VersionSpan.model_fields})
    return columns


_PLAIN_CALL = ("call_id", "start", "end", "turn", "finish_reason", "logprob_kind", "untrainable_reason",
               "t_request", "t_done")


def _exact(call: Call) -> bool:
    """Whether the stored log-prob is that of the distribution the token was drawn from."""
    sampling, kind = call.sampling, call.logprob_kind
    plain = not sampling.truncated
    return kind == "processed" or (kind == "tempered" and plain) or (
        kind == "raw" and plain and sampling.temperature == 1.0)


def _unknown(call: Call) -> bool:
    return any(span.version < 0 for span in call.versions)


def _status(reason: StopReason) -> str:
    """``sealed`` for an episode the agent ended, ``truncated`` for one a budget ended, ``aborted`` for a fault."""
    return "aborted" if reason in _UNSCORED else "sealed" if reason in _WHOLE else "truncated"


def _usable(branch: Branch) -> tuple[Call, ...]:
    """Calls whose tokens the learner may use; all of them when there is none."""
    return tuple(call for call in branch.calls if call.untrainable_reason is None) or branch.calls


def _weakest(branch: Branch) -> str:
    """The weakest kind of log-prob over the usable calls."""
    return max((call.logprob_kind for call in _usable(branch)), key=LOGPROB_KINDS.index, default="none")


def _call_kept_set(call: Call, branch: Branch) -> str:
    if not call.sampling.truncated:
        return "not_needed"
    return "missing" if branch.kept_counts is None else "present"


def _kept_set(branch: Branch) -> str:
    """``missing`` when a usable call was truncated and no kept set was recorded: its ratio would be biased."""
    states = {_call_kept_set(call, branch) for call in _usable(branch)}
    return next((state for state in ("missing", "present") if state in states), "not_needed")


def _untrainable(episode: Episode, branch: Branch, count: np.ndarray) -> str | None:
    """Why a row has nothing to learn from, None when it has; ``count`` is tokens by kind."""
    if count[1]:
        return None
    named = next((call.untrainable_reason for call in branch.calls if call.untrainable_reason), None)
    if named or episode.stop_reason in _UNSCORED:
        return named or "engine_error"
    if not count[4] + count[5]:
        return "no_token_ids"
    return _KIND_REASON.get(_weakest(branch), "no_logprobs") if count[5] else "masked_by_policy"


def _first_version(branch: Branch) -> int:
    """The version that sampled the first token, -1 when nothing was sampled."""
    return next((s.version for call in branch.calls for s in call.versions if s.end > s.start), -1)


def _column(field: pa.Field, records: list[Json]) -> pa.Array:
    """One column from the records; token arrays are concatenated without a detour over Python numbers."""
    values = [record.get(field.name) for record in records]
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    if field.name == "calls":
        lengths = [record["n_calls"] for record in records]
        flat = _calls_column([record["calls"] for record in records])
    else:
        filled = [() if value is None else value for value in values]
        lengths = [len(value) for value in filled]
        dtype = field.type.value_type.to_pandas_dtype()
        flat = pa.array(np.concatenate([np.asarray(value, dtype) for value in filled] or [np.empty(0, dtype)]))
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
    mask = pa.array([value is None for value in values]) if any(value is None for value in values) else None
    return pa.ListArray.from_arrays(offsets, flat, type=field.type, mask=mask)


def _calls_column(branches: list[Columns]) -> pa.StructArray:
    """All calls of all rows as one struct array."""
    return _struct_array(CALL, branches, sum(len(calls["call_id"]) for calls in branches))


def _struct_array(kind: pa.StructType, columns: Sequence[Columns], n: int) -> pa.StructArray:
    """Struct array of length ``n`` from one set of columns per row."""
    children = []
    for field in kind:
        parts: list[Any] = [each[field.name] for each in columns if field.name in each]
        if not parts:
            children.append(pa.nulls(n, field.type))
        elif pa.types.is_list(field.type):
            counts = list(chain.from_iterable(part.counts for part in parts))
            inner = _struct_array(field.type.value_type, [part.columns for part in parts], sum(counts))
            offsets = pa.array(np.cumsum([0, *counts]), pa.int32())
            children.append(pa.ListArray.from_arrays(offsets, inner, type=field.type))
        else:
            children.append(pa.array(list(chain.from_iterable(parts)), field.type))
    return pa.StructArray.from_arrays(children, fields=list(kind))


# ------------------------------------------------------------------------------------------------------- reading


class RowReader:
    """Decodes single rows of a table that holds at least the learner's columns; arrays are views, nothing is copied.

    Args:
        table: rows of one row group, as read from the file.
    """

    def __init__(self, table: pa.Table) -> None:
        self.nbytes = table.nbytes
        self.verified: set[int] = set()  # rows whose token hash was found right since they were decoded
        self._lists: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._scalars: dict[str, list[Any]] = {}
        for name in table.schema.names:
            array = _one_chunk(table.column(name))
            if name == "calls":
                self._read_calls(array)
            elif pa.types.is_list(array.type):
                missing = array.is_null().to_numpy(zero_copy_only=False)
                self._lists[name] = (array.offsets.to_numpy(), array.values.to_numpy(), missing)
            else:
                self._scalars[name] = array.to_pylist()

    def __len__(self) -> int:
        return len(self._scalars["episode_id"])

    def _read_calls(self, array: Any) -> None:
        """Split the calls into their fields, and the version spans into three number arrays."""
        self._call_at = array.offsets.to_numpy()
        there = {field.name for field in array.type.value_type}  # a learner asks for no times
        self._call = {name: array.values.field(name) for name in _CALL_NAMES & there}
        spans = array.values.field("versions")
        self._span_at = spans.offsets.to_numpy()
        self._spans = [spans.values.field(f.name).to_numpy(zero_copy_only=False) for f in VERSION_SPAN]

    def key(self, i: int) -> Key:
        """Key of row ``i``."""
        return Key(self._scalars["episode_id"][i], self._scalars["branch_id"][i], self._scalars["attempt"][i])

    def tokens_sha256(self, i: int) -> bytes:
        """Hash of the token arrays of row ``i`` as they were read."""
        return tokens_sha256(*(self._list(n, i) for n in _ARRAYS))  # pyright: ignore[reportArgumentType]

    def tokens(self, i: int) -> Tokens:
        """Token columns of row ``i``."""
        return Tokens(self.key(i), *(self._list(n, i) for n in _ARRAYS))  # pyright: ignore[reportArgumentType]

    def row(self, i: int) -> Row:
        """Row ``i`` as it was appended, without overlays."""
        at = {name: values[i] for name, values in self._scalars.items()}
        grade = Grade.model_validate_json(at["rewards_json"]) if at["rewards_json"] else None
        return Row(
            key=self.key(i), branch=self.branch(i), task_id=at["task_id"], env_id=at["env_id"], run_id=at["run_id"],
            group_id=at["group_id"], stop_reason=StopReason(at["stop_reason"]), grade=grade,
            hint=_stamped_hint(at["extra"]),
            reward=at["reward"], policy_versions=(at["policy_version_min"], at["policy_version_max"]),
            tokenizer_sha256=at["tokenizer_sha256"], chat_template_sha256=at["chat_template_sha256"],
            train_allowed=bool(at["train_allowed"]))

    def branch(self, i: int) -> Branch:
        """Branch of row ``i``; the row rules are checked once more."""
        at = {name: self._scalars[name][i] for name in ("branch_id", "parent_branch_id", "fork_at", "fork_reason")}
        arrays = {name: self._list(name, i) for name in _ARRAYS}
        return Branch(**at, **arrays, calls=self._calls(i))  # pyright: ignore[reportArgumentType]

    def _list(self, name: str, i: int) -> np.ndarray | None:
        offsets, values, missing = self._lists[name]
        return None if missing[i] else values[offsets[i]:offsets[i + 1]]

    def _calls(self, i: int) -> tuple[Call, ...]:
        first, stop = int(self._call_at[i]), int(self._call_at[i + 1])
        fields = {name: array.slice(first, stop - first).to_pylist() for name, array in self._call.items()}
        if fields:
            fields["prompt_sha256"] = [(value or b"").hex() for value in fields["prompt_sha256"]]
        calls = [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]
        for at, call in enumerate(calls, first):
            call["sampling"] = {name: call.pop(name) for name in Sampling.model_fields}
            call["versions"] = self._versions(at)
        return _CALLS.validate_python(calls)

    def _versions(self, at: int) -> list[Json]:
        """Version spans of the call with index ``at`` in the row group."""
        parts = (part[self._span_at[at]:self._span_at[at + 1]].tolist() for part in self._spans)
        return [{"version": v, "start": a, "end": b} for v, a, b in zip(*parts, strict=True)]


_CALLS = TypeAdapter(tuple[Call, ...])
_CALL_NAMES = {*Call.model_fields, *Sampling.model_fields} - {"sampling", "versions"}
_ARRAYS = ("token_ids", "token_kind", "logprobs", "kept_ids", "kept_counts")


def _one_chunk(column: pa.ChunkedArray) -> Any:
    """The column as one array."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _stamped_hint(extra: str | None) -> Hint | None:
    hint = json.loads(extra).get("hint") if extra else None
    return Hint(**hint) if hint else None


def to_episode(table: pa.Table) -> Episode:
    """The episode whose rows (all of one attempt, any order) these are; the inverse of :func:`to_rows`.

    Raises:
        RowError: no rows, or rows of more than one episode or attempt.
    """
    table = conform(table).sort_by("branch_id")
    names = set(zip(table["episode_id"].to_pylist(), table["attempt"].to_pylist(), strict=True))
    if len(names) != 1:
        raise RowError(f"{len(table)} rows of {len(names)} episodes are not one episode", fix="select one episode id")
    reader, first = RowReader(table), {n: table[n][0].as_py() for n in table.schema.names if n not in _WIDE}
    rows, extra = [reader.row(i) for i in range(len(reader))], json.loads(first["extra"] or "{}")
    return Episode(
        **{name: first[name] for name in _EPISODE_FIELDS}, branches=tuple(row.branch for row in rows),
        stop_reason=StopReason(first["stop_reason"]), grade=rows[0].grade, hint=rows[0].hint,
        vocab_size=extra.get("vocab_size", 0), messages=tuple(json.loads(first["messages_json"] or "[]")),
        tools=tuple(json.loads(first["tools_json"] or "[]")), metadata=extra.get("metadata", {}))


_WIDE = (*_ARRAYS, "calls")
