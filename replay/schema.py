"""Columns of the store (format ``agentsdpo-replay/1``), how they are encoded, and add-only evolution.

One row is one branch of one episode; ``calls`` holds one struct per request to the engine. Later releases may add
nullable columns, at the end of the row or of ``calls``: readers ignore what they do not know and read null for what
an older file lacks. Any other change needs an entry in ``features`` of ``STORE.json``.
"""

from typing import Any

import pyarrow as pa

from agentsdpo.errors import CorruptionError


def listed(element: pa.DataType) -> pa.DataType:
    """List type whose elements are never null, under the Parquet path ``column.list.element``."""
    return pa.list_(pa.field("element", element, nullable=False))


_TIME = pa.timestamp("us", tz="UTC")
_SHA = pa.binary(32)

VERSION_SPAN = pa.struct([("version", pa.int64()), ("start", pa.int32()), ("end", pa.int32())])
TOOL_SPAN = pa.struct([("tool_call_id", pa.string()), ("name", pa.string()), ("start", pa.int32()),
                       ("end", pa.int32()), ("parse_ok", pa.bool_())])
CALL = pa.struct([
    ("call_id", pa.string()), ("parent_call_id", pa.string()), ("retry", pa.int32()),
    ("endpoint", pa.string()), ("route", pa.string()), ("adapter", pa.string()),
    ("start", pa.int32()), ("end", pa.int32()), ("prompt_sha256", _SHA),
    ("finish_reason", pa.string()), ("finish_reason_raw", pa.string()),
    ("stop_token_id", pa.int32()), ("stop_string", pa.string()),
    ("temperature", pa.float64()), ("top_p", pa.float64()), ("top_k", pa.int32()), ("min_p", pa.float64()),
    ("presence_penalty", pa.float64()), ("frequency_penalty", pa.float64()), ("repetition_penalty", pa.float64()),
    ("seed", pa.int64()), ("max_tokens", pa.int32()), ("has_logit_bias", pa.bool_()),
    ("structured_output", pa.string()),
    ("logprob_kind", pa.string()), ("lp_exact", pa.bool_()), ("kept_set", pa.string()),
    ("untrainable_reason", pa.string()),
    ("versions", listed(VERSION_SPAN)), ("version_source", pa.string()),
    ("spec_decode", pa.bool_()), ("tools", listed(TOOL_SPAN)),
    ("prompt_tokens", pa.int32()), ("cached_tokens", pa.int32()), ("completion_tokens", pa.int32()),
    ("reasoning_tokens", pa.int32()),
    ("t_request", _TIME), ("t_first_token", _TIME), ("t_done", _TIME), ("mono_ns", pa.int64()),
    ("error", pa.string()), ("turn", pa.int32()),
])
"""One request to an engine. Null means not recorded; a filter or penalty that is null was off."""

SCHEMA = pa.schema([
    ("episode_id", pa.string()), ("branch_id", pa.int32()), ("attempt", pa.int32()),
    ("parent_branch_id", pa.int32()), ("fork_at", pa.int32()), ("fork_reason", pa.string()),
    ("run_id", pa.string()), ("env_id", pa.string()), ("task_id", pa.string()), ("writer_id", pa.string()),
    ("group_id", pa.string()), ("group_size", pa.int32()),
    ("status", pa.string()), ("stop_reason", pa.string()), ("train_allowed", pa.bool_()),
    ("trainable", pa.bool_()), ("untrainable_reason", pa.string()),
    ("policy_version_min", pa.int64()), ("policy_version_max", pa.int64()), ("policy_version_start", pa.int64()),
    ("logprob_kind", pa.string()), ("kept_set", pa.string()),
    ("reward", pa.float64()), ("rewards_json", pa.string()), ("reward_status", pa.string()),
    ("n_tokens", pa.int32()), ("n_sampled", pa.int32()), ("n_trainable", pa.int32()),
    ("n_calls", pa.int32()), ("n_turns", pa.int32()),
    ("t_start", _TIME), ("t_end", _TIME), ("mono_ns", pa.int64()),
    ("model_id", pa.string()), ("tokenizer_sha256", pa.string()), ("chat_template_sha256", pa.string()),
    ("engine", pa.string()), ("engine_version", pa.string()), ("dtype", pa.string()), ("quantisation", pa.string()),
    ("token_ids", listed(pa.int32())), ("token_kind", listed(pa.uint8())), ("logprobs", listed(pa.float32())),
    ("calls", listed(CALL)),
    ("kept_ids", listed(pa.int32())), ("kept_counts", listed(pa.int32())),
    ("messages_json", pa.string()), ("tools_json", pa.string()), ("extra", pa.string()),
    ("tokens_sha256", _SHA), ("content_sha256", _SHA),
])
"""All columns of a row, in the order canonical bytes are taken in."""

_JSON = ("rewards_json", "messages_json", "tools_json", "extra")
_DELTA = ("policy_version_min", "policy_version_max", "policy_version_start", "t_start", "t_end", "mono_ns")
SCALARS = [f.name for f in SCHEMA if not pa.types.is_list(f.type) and f.name not in (*_JSON, *SCHEMA.names[-2:])]
"""Columns to filter by: no arrays, no JSON, no hashes."""

GIVEN = pa.schema([("label", pa.string()), ("t_stored", _TIME)])
"""What no row holds and every table of rows ends with: its latest label, and when it was committed."""

LEARNER_CALL_FIELDS = ["call_id", "start", "end", "prompt_sha256", "finish_reason", "temperature", "top_p", "top_k",
                       "seed", "max_tokens", "logprob_kind", "untrainable_reason", "versions", "turn"]
TOKEN_COLUMNS = ["episode_id", "branch_id", "attempt", "token_ids", "token_kind", "logprobs", "kept_ids",
                 "kept_counts"]
"""Key and token columns of a row: what its token hash covers."""
LEARNER_COLUMNS = [
    "episode_id", "branch_id", "attempt", "parent_branch_id", "fork_at", "fork_reason", "run_id", "env_id", "task_id",
    "group_id", "stop_reason", "train_allowed", "policy_version_min", "policy_version_max", "reward", "rewards_json",
    "tokenizer_sha256", "chat_template_sha256", "token_ids", "token_kind", "logprobs", "kept_ids", "kept_counts",
    "extra",
    *(f"calls.list.element.{name}" for name in LEARNER_CALL_FIELDS)]
"""What a learner read decodes: everything that makes a :class:`~agentsdpo.replay.Row`."""


def _leaves(kind: pa.DataType, path: str) -> list[tuple[str, pa.DataType]]:
    """Parquet paths and types of the leaf columns below one field."""
    if pa.types.is_list(kind):
        return _leaves(kind.value_type, f"{path}.list.element")
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(field.type, f"{path}.{field.name}")]
    return [(path, kind)]


def _write_options() -> dict[str, Any]:
    """Parquet encodings: BSS for token ids and log-probs, delta for versions and times, dictionary elsewhere."""
    encoding = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("token_ids", "logprobs", "kept_ids")}
    encoding |= {"kept_counts.list.element": "DELTA_BINARY_PACKED", "tokens_sha256": "PLAIN", "content_sha256": "PLAIN",
                 "reward": "PLAIN"}
    encoding |= {name: "DELTA_BINARY_PACKED" for name in _DELTA}
    encoding |= {name: "PLAIN" for name in _JSON}
    leaves = [leaf for field in SCHEMA for leaf in _leaves(field.type, field.name)]
    dictionary = [path for path, kind in leaves if path not in encoding and not pa.types.is_boolean(kind)]
    return dict(compression="zstd", compression_level=1, use_dictionary=dictionary, column_encoding=encoding,
                write_statistics=SCALARS, write_page_checksum=True)


WRITE_OPTIONS = _write_options()
"""Keyword arguments of :class:`pyarrow.parquet.ParquetWriter`; page checksums are always on."""


def conform(table: pa.Table) -> pa.Table:
    """A table of any release of format 1 in this release's columns: unknown ones dropped, missing ones null.

    Raises:
        CorruptionError: a known column has a type that cannot be converted.
    """
    columns = [_conform_column(table, field) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _conform_column(table: pa.Table, field: pa.Field) -> pa.ChunkedArray | pa.Array:
    """One column of :func:`conform`."""
    if field.name not in table.schema.names:
        return pa.nulls(len(table), field.type)
    column = table.column(field.name)
    if column.type.equals(field.type):
        return column
    try:
        return _conform_array(column.combine_chunks(), field.type)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise CorruptionError(f"column {field.name} has type {column.type}, not {field.type} ({error})",
                              fix="the file was not written in format agentsdpo-replay/1") from error


def _conform_array(array: Any, kind: pa.DataType) -> Any:
    """Cast, going into lists of structs so that fields may be added or missing there too."""
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_list(kind) and pa.types.is_struct(kind.value_type) and pa.types.is_list(array.type):
        start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
        offsets = pa.array(array.offsets.to_numpy() - start, pa.int32())
        values = _conform_array(array.values.slice(start, stop - start), kind.value_type)
        return pa.ListArray.from_arrays(offsets, values, type=kind, mask=array.is_null())
    if pa.types.is_struct(kind) and pa.types.is_struct(array.type):
        have = {field.name for field in array.type}
        children = [_conform_array(array.field(f.name), f.type) if f.name in have else pa.nulls(len(array), f.type)
                    for f in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    return array.cast(kind)
