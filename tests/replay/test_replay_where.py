import operator
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentsdpo.errors import ConfigError
from agentsdpo.replay.where import COLUMNS, select, where

ROWS = [
    dict(episode_id="a", env_id="desk", status="sealed", reward=0.0, n_tokens=10, n_calls=2, trainable=True),
    dict(episode_id="b", env_id="desk", status="truncated", reward=0.5, n_tokens=20, n_calls=2_000_000_000,
         trainable=True, label="good", t_start=datetime(2026, 2, 1, tzinfo=UTC)),
    dict(episode_id="c", env_id="mcp_x", status="sealed", reward=1.0, n_tokens=30, n_calls=1, trainable=False),
    dict(episode_id="d", env_id="mcp%x", status="aborted", reward=None, n_tokens=0, n_calls=0, trainable=None,
         t_start=datetime(2026, 1, 1, tzinfo=UTC)),
]
TABLE = pa.Table.from_pylist(ROWS, COLUMNS)


@pytest.mark.parametrize(("text", "ids"), [
    ("env_id == 'desk' and reward >= 0.5", "b"),
    ("reward != 0.5", "ac"), ("not (reward == 0.5)", "ac"), ("reward is None", "d"), ("reward is not None", "abc"),
    ("0 < reward <= 1", "bc"), ("0.2 < reward <= 0.8 or n_tokens < 1", "bd"),
    ("status in ('sealed', 'aborted')", "acd"), ("status not in ['sealed']", "bd"), ("reward in (0, 1)", "ac"),
    ("reward not in (1,)", "ab"), ("n_tokens in {10.0, 20}", "ab"), ("reward in (-1,)", ""), ("reward > -1", "abc"),
    ("trainable", "ab"), ("not trainable", "c"), ("trainable == True", "ab"),
    ("n_tokens / n_calls > 4.9 and n_tokens / n_calls < 5.1", "a"), ("n_calls / n_tokens < 0.1", "c"),
    ("n_calls + n_calls > 3000000000", "b"), ("-n_tokens < -25", "c"), ("n_tokens * 2 - 1 == 39", "b"),
    ("1 / n_calls == 0.5", "a"), ("n_calls > 0.5", "abc"), ("n_calls * 0.5 > 1", "b"), ("n_calls in (0.5, 2)", "a"),
    ("n_calls == 2000000000.0", "b"), ("length(env_id) / 2 == 2.5", "cd"),
    ("like(env_id, 'mcp%')", "cd"), (r"like(env_id, 'mcp\\%x')", "d"), ("length(env_id) == 4", "ab"),
    ("t_start >= '2026-01-15'", "b"), ("'2026-01-01T01:00:00+01:00' == t_start", "d"), ("t_end is None", "abcd"),
    ("label is None and reward is not None", "ac"), ("label == 'good'", "b"), ("True", "abcd"), (" True ", "abcd"),
])
def test_what_a_filter_keeps(text: str, ids: str) -> None:
    assert "".join(select(TABLE, text)["episode_id"].to_pylist()) == ids


@pytest.mark.parametrize(("text", "says"), [
    ("rewrd > 0", "did you mean reward"), ("zzzz == 1", "one of episode_id"),
    ("reward > 'x'", "does not fit"), ("reward", "does not fit"), ("trainable == 1", "does not fit"),
    ("reward == None", "is None"), ("reward in (None,)", "is None"), ("reward is 3", "write =="),
    ("'a' in env_id", "like"), ("status in ('a', 3)", "does not fit"), ("reward >", "cannot be read"), ("", "cannot"),
    ("reward > 10**3", "not in its language"), ("__import__('os')", "calls __import__"),
    ("like(env_id)", "like\\(column"), ("length(env_id, 2)", "length\\(column"), ("(lambda: 1)()", "not in its"),
    ("env_id.x == 1", "not in its language"), ("[x for x in (1,)]", "not in its language"),
    ("f'{reward}' == 'x'", "not in its"),
    ("reward > b'x'", "where a value"), ("reward > 1j", "where a value"), ("n_tokens > " + "9" * 40, "cannot be read"),
    ("(reward := 1)", "not in its"), ("like(env_id, pattern='x')", "not in its"),
    ("t_start > 'soon'", "cannot be read"),
    ("reward > 0 " * 900, "9900 characters"), ("(" * 2000 + "1" + ")" * 2000, "cannot be read"),
    ("status > 0.5", "no number"), ("env_id + 1 == 2", "no number"), ("'a' * 2 == 'aa'", "no number"),
    ("t_end - t_start > 1", "no number"), ("not " * 1000 + "True", "cannot be read"),
    ("reward > 0\0", "cannot be read"),
])
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        where(text)
    assert caught.value.exit_code == 2


@given(st.text(alphabet="reward n_tokens<>=!()'.,0129 andornotiselk%-+*/", max_size=40))
def test_any_text_is_a_filter_or_a_config_error(text: str) -> None:
    try:
        expression = where(text)
    except ConfigError:
        return
    select(TABLE, expression)


NUMBERS = st.one_of(st.integers(-40, 40), st.floats(-2, 2, allow_nan=False).map(lambda x: round(x, 3)))
COMPARE = {"<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt,
           ">=": operator.ge}
Meaning = Callable[[dict[str, Any]], bool]


@st.composite
def filters(draw: st.DrawFn, depth: int = 3) -> tuple[str, Meaning]:
    """A filter, and what it says about a row."""
    kind = draw(st.sampled_from(["leaf", "and", "or", "not"])) if depth else "leaf"
    if kind == "leaf":
        low, high, name = draw(NUMBERS), draw(NUMBERS), draw(st.sampled_from(["n_tokens", "n_calls"]))
        first, second = draw(st.sampled_from(list(COMPARE))), draw(st.sampled_from(list(COMPARE)))
        return (f"{low} {first} {name} {second} {high}",
                lambda row: COMPARE[first](low, row[name]) and COMPARE[second](row[name], high))
    text, means = draw(filters(depth - 1))
    if kind == "not":
        return f"not ({text})", lambda row: not means(row)
    other, also = draw(filters(depth - 1))
    both = all if kind == "and" else any
    return f"({text}) {kind} ({other})", lambda row: both((means(row), also(row)))


@given(filters())
def test_a_filter_means_what_its_words_mean(made: tuple[str, Meaning]) -> None:
    text, means = made
    assert select(TABLE, text)["episode_id"].to_pylist() == [row["episode_id"] for row in ROWS if means(row)]
