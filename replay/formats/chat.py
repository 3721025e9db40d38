"""Conversations: OpenAI chat JSONL (``openai``) and the ``messages`` + ``tools`` of Hugging Face data sets (``hf``).

``openai`` lines hold ``messages`` and ``tools`` and nothing else, as fine-tuning services take them. ``hf`` lines also
hold where the conversation comes from and its reward; ``tools`` is one JSON text there, since a column of a data set
has one type. Neither has room for tokens: what is imported can be read and exported, not trained on off-policy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from agentsdpo.errors import FormatError, RowError
from agentsdpo.replay.canonical import to_json
from agentsdpo.replay.formats.bag import describe
from agentsdpo.replay.formats.files import parse, read_lines, valid_text
from agentsdpo.replay.formats.reading import ENV_ID, Foreign, Found, Notes, checked, foreign, silent
from agentsdpo.replay.formats.shapes import Message, message_of
from agentsdpo.types import Episode, Grade, Json


def openai_line(episode: Episode) -> Json:
    """An episode as a line of a fine-tuning file."""
    line: Json = {"messages": [message_of(message) for message in episode.messages]}
    return valid_text(line | ({"tools": list(episode.tools)} if episode.tools else {}))


def hf_line(episode: Episode) -> Json:
    """An episode as a row of a data set: the same columns, of the same types, in every row."""
    return valid_text({
        "messages": [message_of(message) for message in episode.messages],
        "tools": to_json(list(episode.tools)) if episode.tools else None,
        "episode_id": episode.episode_id, "task_id": episode.task_id, "env_id": episode.env_id,
        "group_id": episode.group_id, "model_id": episode.model_id, "stop_reason": str(episode.stop_reason),
        "reward": episode.reward, "train_allowed": episode.train_allowed})


# ------------------------------------------------------------------------------------------------------- reading


class _Line(BaseModel):
    """One conversation; columns beyond these find no place."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    messages: list[Message]
    tools: list[dict[str, Any]] | str | None = None
    episode_id: str | None = None
    task_id: str | None = None
    env_id: str | None = None
    group_id: str | None = None
    model_id: str | None = None
    reward: float | None = None
    train_allowed: bool | None = None


def read(path: Path, notes: Notes, siblings: frozenset[Path]) -> Iterator[Found]:
    """Conversations of a ``.jsonl`` or ``.parquet`` file.

    Raises:
        FormatError: a message has no role, an unknown one, or parts of the wrong type; tools are no JSON.
    """
    for where, value in _parquet_rows(path) if path.suffix == ".parquet" else read_lines(path):
        line = checked(_Line, value, where)
        for name in line.model_extra or ():
            if name != "stop_reason":
                notes.lose(name, value[name])
        messages = value["messages"]
        grade = None if line.reward is None else Grade(results=(), mean=line.reward, passed=None)
        episode = foreign(Foreign(
            format="chat", messages=messages, calls=silent(messages), tools=_tools(line.tools, where), grade=grade,
            task_id=line.task_id or "", env_id=line.env_id or ENV_ID, group_id=line.group_id or "",
            model_id=line.model_id or ""))
        yield Found(episode, line.train_allowed, line.episode_id or where, where)


def _tools(tools: list[Json] | str | None, where: str) -> list[Json]:
    """Tools as objects, from a list of them or its JSON text."""
    read = parse(tools.encode(), f"{where}: tools") if isinstance(tools, str) else tools or []
    if not isinstance(read, list) or not all(isinstance(tool, dict) for tool in read):
        raise FormatError(f"{where}: tools is no list of objects", fix="give tools in OpenAI's shape")
    return read


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a data set's file.

    Fields that are null only because others have them are left out of messages. Messages may also be JSON texts, as
    ``datasets`` writes them where not all have the same fields.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}:{number}"
                    row = {name: value if name in _Line.model_fields else None if value is None else True
                           for name, value in row.items()}  # other columns only count as lost, whatever they hold
                    messages = _parsed(row.get("messages"), where)
                    if isinstance(messages, list):
                        row["messages"] = [_present(_parsed(message, where)) for message in messages]
                    yield where, parse(to_json(row).encode(), where)
    except (pa.ArrowException, OSError, RowError) as error:
        raise FormatError(f"{path} cannot be read: {describe(error)}", fix="name a Parquet file with a column "
                          "messages") from error


def _parsed(value: Any, where: str) -> Any:
    return parse(value.encode(), f"{where}: messages") if isinstance(value, str) else value


def _present(value: Any) -> Any:
    """A value without the fields of its structs that are null."""
    if isinstance(value, dict):
        return {name: _present(inner) for name, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value
