"""Chat templates without rendering: most put what is said into fixed text, and that text is found out once.

A template may look at what it is given: trim it, leave out what is empty, treat a tag in it specially, put in the id of
a call. So each shape of messages (their roles, and whatever ``key`` stands for) is probed with contents and ids that
provoke this; where one of them does not come out as it should, every such history is rendered by the template itself.
That takes a dozen renderings, and is done when a shape comes a second time: most long histories come once.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import chain

from agentsdpo.types import Json

PROBES = ("a", "", " b \n", "\n\nc\n", '{"d": "<e> & \'f\'", "g": [1, null]}', "{{ h }} {% i %}",
          "\xe9\u200b \u6f22 \U0001f600", "<tool_response>\nj\n</tool_response>", "<think>\nk\n</think>\nl",
          "<tool_call>\n{}\n</tool_call>", "m " * 400)
MOST = 256
"""Shapes that are remembered."""
_MARK = "\ue000{}\ue001"
_KEYS = {"role", "content", "tool_call_id"}


class Frames:
    """The fixed text around the contents of messages, by their shape.

    >>> frames = Frames()
    >>> frames.text("k", [{"role": "user", "content": "x"}], lambda told: f"<u>{told[0]['content']}</u>")
    '<u>x</u>'
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[str, ...] | None] = {}
        self._once = set[Hashable]()

    def text(self, key: Hashable, messages: Sequence[Json], render: Callable[[Sequence[Json]], str]) -> str:
        """What ``render`` makes of the messages.

        Args:
            key: what the rendering depends on besides the messages.
            messages: any; those with more than a text are rendered.
            render: the template.
        """
        if not all(message.keys() <= _KEYS and isinstance(message["content"], str) for message in messages):
            return render(messages)
        shape = (key, *((message["role"], "tool_call_id" in message) for message in messages))
        if shape not in self._known:
            if len(self._known) >= MOST:
                self._known.clear()
                self._once.clear()
            self._known[shape] = None
            self._once.add(shape)
        elif shape in self._once:
            self._once.discard(shape)
            self._known[shape] = _pieces(messages, render)
        pieces = self._known[shape]
        if pieces is None:
            return render(messages)
        said = (message["content"] for message in messages)
        return "".join(chain.from_iterable(zip(pieces, said, strict=False))) + pieces[-1]


def _pieces(messages: Sequence[Json], render: Callable[[Sequence[Json]], str]) -> tuple[str, ...] | None:
    """Fixed text before, between and behind the contents; None where a probe does not come out verbatim.

    >>> _pieces([{"role": "user", "content": "x"}], lambda told: f"<u>{told[0]['content'].strip()}</u>") is None
    True
    """
    marked = [{**message, "content": _MARK.format(i)} for i, message in enumerate(messages)]
    rest, pieces = render(marked), list[str]()
    for i in range(len(messages)):
        before, mark, rest = rest.partition(_MARK.format(i))
        if not mark:
            return None
        pieces.append(before)
    pieces.append(rest)
    for shift in range(len(PROBES)):  # each content in each place, beside others
        said = [PROBES[(shift + 3 * i) % len(PROBES)] for i in range(len(messages))]
        filled = "".join(chain.from_iterable(zip(pieces, said, strict=False))) + pieces[-1]
        if render(_told(messages, said, shift)) != filled:
            return None
    return tuple(pieces)


def _told(messages: Sequence[Json], contents: Sequence[str], shift: int) -> list[Json]:
    """The messages with other contents and other ids of calls, in another order: a template may put ids in, or sort."""
    ids = [f"other_{(i + shift) % len(messages)}" for i in range(len(messages))]
    return [{**message, "content": content, **({"tool_call_id": id_} if "tool_call_id" in message else {})}
            for message, content, id_ in zip(messages, contents, ids, strict=True)]
