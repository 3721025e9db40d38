"""An engine that samples by script, and a proxy before it, in a thread with an event loop of their own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from proxy_stack import Stack  # noqa: E402

from agentsdpo.chat import ChatFormat  # noqa: E402


@pytest.fixture(scope="session")
def chat(tiny_tokenizer: Any) -> ChatFormat:
    return ChatFormat(tiny_tokenizer)


@pytest.fixture
def stack(chat: ChatFormat, tmp_path: Path) -> Iterator[Stack]:
    """Engine and proxy; nothing runs before ``start``."""
    made = Stack(chat, tmp_path / "store")
    yield made
    made.stop()
