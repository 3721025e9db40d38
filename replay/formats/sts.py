"""STS, the session traces that the Hugging Face trace viewer shows: one session line, then one line a message.

Text only, made to be looked at by others: an export without redaction is refused unless somebody says it was checked.
"""

from collections.abc import Iterator

from agentsdpo.replay.formats.files import valid_text
from agentsdpo.replay.formats.shapes import message_of
from agentsdpo.types import Episode, Json


def lines(episode: Episode) -> Iterator[Json]:
    """A session and its messages."""
    yield valid_text({"type": "session", "harness": "agentsdpo", "id": episode.episode_id, "name": episode.task_id})
    for message in episode.messages:
        yield valid_text({"type": "message", "message": message_of(message)})
