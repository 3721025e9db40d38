"""The terminal views and the summary table."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentsdpo.errors import ConfigError
from agentsdpo.show import console
from agentsdpo.show.live import LiveView


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Show = Callable[..., str]


@pytest.fixture
def show(arm_rows: Callable[..., list[dict[str, Any]]]) -> Show:
    """Runs four made-up steps through a view and returns what was written."""
    def run(out: io.StringIO, mode: str = "auto") -> str:
        with console.training(4, "demo [bold]x[/bold]", mode=mode, file=out) as view:
            view.stage("zero-shot evaluation")
            for row in arm_rows(0, steps=4):
                (view.step if row["kind"] == "step" else view.evaluation)(row)
            view.note("policy 3 published\x1b[2J\nand loaded")
        return out.getvalue()
    return run


def test_plain_mode_is_one_line_per_event_without_control_characters(show: Show) -> None:
    text = show(io.StringIO())
    lines = text.splitlines()
    assert lines[0] == "demo [bold]x[/bold]: 4 steps"
    assert lines[1] == "zero-shot evaluation"
    assert lines[2] == "step 0/4  eval val sampled  pass 0.0 % [0.0, 2.9]  score 0.252  n 128"
    assert len(lines) == 2 + 4 + 4 + 1
    assert "\x1b" not in text
    assert lines[-1] == "note: policy 3 published [2J and loaded"
    assert lines[6].startswith("step 1/4  pass ")
    assert "staleness 0.5" in lines[6]
    assert "s/step" in lines[6]


def test_plain_mode_survives_a_narrow_encoding() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with console.training(1, "Büro – demo", mode="plain", file=out):
        pass
    assert raw.getvalue() == b"B?ro ? demo: 1 steps\n"


def test_auto_is_live_on_a_terminal_and_plain_on_a_dumb_one(monkeypatch: pytest.MonkeyPatch, show: Show) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in show(Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in show(Terminal())


def test_live_view_ends_with_the_whole_state(monkeypatch: pytest.MonkeyPatch, show: Show) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "130")
    text = show(Terminal(), mode="rich")
    last = text.rsplit("demo [bold]x[/bold]", 1)[1]
    assert "4/4" in last
    assert "reward" in last
    assert "test_names" in last
    assert "staleness" in last
    assert "policy 3 published [2J and loaded" in text
    assert "\x1b[2J" not in text


def test_no_colour_is_honoured(monkeypatch: pytest.MonkeyPatch, show: Show) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[34m" not in show(Terminal(), mode="rich")
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[34m" in show(Terminal(), mode="rich")


def test_live_view_restores_the_terminal_when_training_breaks() -> None:
    out = Terminal()
    with pytest.raises(ZeroDivisionError), LiveView(3, "demo", out):
        _ = 1 / 0
    assert out.getvalue().endswith("\x1b[?25h")


def test_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with console.training(1, "demo", mode="plain") as view:
        view.note("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "demo: 1 steps\nnote: hello\n"


def test_none_says_nothing(capsys: pytest.CaptureFixture[str], show: Show) -> None:
    assert show(io.StringIO(), mode="none") == ""
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="use auto, rich, plain or none"), console.training(1, "demo", mode="loud"):
        pass


def test_pace_counts_the_recent_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, *[100.0 + 2 * i for i in range(1, 40)]])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    pace = console.Pace(50)
    assert pace.words({"step": 0}) == []
    words = [pace.words({"step": step}) for step in range(1, 40)]
    assert words[-1] == ["2 s/step", "left 22 s"]


def test_pace_of_a_resumed_run_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *[5.0 * i for i in range(1, 9)]])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    pace = console.Pace(100)
    words = [pace.words({"step": step, "episodes": 10 * step}) for step in (61, 62, 63)]
    assert words[0] == ["5 s/step", "left 3 min 15 s"]
    assert words[-1][:2] == ["5 s/step", "2 episodes/s"]


def test_pace_of_a_run_looked_at_later_goes_by_its_own_clock() -> None:
    pace = console.Pace(100)
    rows = [{"step": step, "wall_s": 50 + 4.0 * step, "episodes": 32 * step, "tokens": 800 * step}
            for step in range(1, 51)]
    words = [pace.words(row) for row in rows]
    assert words[-1] == ["4 s/step", "8 episodes/s", "200 tokens/s", "left 3 min 20 s"]


def test_summary_shows_intervals_and_splits(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_summary(json.loads((run_dir / "summary.json").read_text()))
    captured = capsys.readouterr()
    for expected in ("off-policy", "no-correction", "93.0 % [88.0, 97.0]", "0.8 % [0.1, 4.3]", "test_firm",
                     "5 min 12 s", "3 840", "99.0 %"):
        assert expected in captured.out, expected
    assert captured.err == ""
    assert "\x1b" not in captured.out


def test_the_mean_score_stands_below_its_pass_rate() -> None:
    out = io.StringIO()
    console.print_summary({"arms": {"robust": {"zero_shot_pass": 0.0, "zero_shot_score": 0.221, "final_pass": 0.03,
                                               "final_score": 0.684}}}, out)
    told = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    start = told.index("zero-shot pass 0.0 %")
    assert told[start:start + 4] == ["zero-shot pass 0.0 %", "zero-shot mean score 22.1 %", "final pass 3.0 %",
                                     "final mean score 68.4 %"]


def test_summary_of_nothing_and_of_hostile_names() -> None:
    out = io.StringIO()
    console.print_summary({}, out)
    console.print_summary({"arms": {"[red]a[/red]\x1b[2J": {"final_pass": 0.5}}}, out)
    text = out.getvalue()
    assert "–" in text
    assert "[red]a[/red] [2J" in text
    assert "\x1b" not in text
    assert "50.0 %" in text
