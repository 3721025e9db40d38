"""Two runs side by side: the numbers, the page, and what is said when they cannot be compared."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentsdpo.errors import RunError
from agentsdpo.show import pages
from agentsdpo.show.comparison import compare, print_comparison, write_comparison
from agentsdpo.stats import difference, wilson
from tests.show.browser import browser, complaints, contrasts, needs_browser
from tests.show.test_report import HOSTILE, assert_self_contained

Write = Callable[[Path], Path]


@pytest.fixture
def runs(tmp_path: Path, write_run: Write) -> tuple[Path, Path]:
    """Two finished runs; the second has another learning rate and passes less often."""
    first, second = write_run(tmp_path / "fast"), write_run(tmp_path / "slow")
    config = second / "arms" / "off-policy" / "config.toml"
    config.write_text(config.read_text().replace("lr = 1e-3", "lr = 1e-5"))
    summary = json.loads((second / "summary.json").read_text())
    summary["arm"] = "off-policy"
    summary["arms"]["off-policy"] |= {"final_pass": 0.5, "final_pass_ci95": [0.41, 0.59]}
    (second / "summary.json").write_text(json.dumps(summary))
    return first, second


def test_the_numbers_of_two_runs(runs: tuple[Path, Path]) -> None:
    found = compare(*runs)
    final = next(row for row in found["rates"] if row["name"] == "final pass")
    assert final["a"] == pytest.approx([0.93, 0.88, 0.97])
    assert final["b"] == pytest.approx([0.5, 0.41, 0.59])
    assert final["difference"][0] == pytest.approx(0.43)
    low, high = final["difference"][1:]
    assert low < 0.43 < high
    assert found["settings"] == [{"key": "learn.lr", "a": "0.001", "b": "1e-05"}]
    assert found["warnings"] == []
    assert found["verdict"].startswith("fast passes more often than slow: fast minus slow is +43.0 points [")
    assert compare(*reversed(runs))["verdict"].startswith("fast passes more often than slow: slow minus fast is -43.0")
    assert {row["name"] for row in found["splits"]} == {"val", "test_names", "test_period", "test_firm"}
    json.dumps(found, allow_nan=False)


def test_a_run_cannot_be_told_apart_from_itself(runs: tuple[Path, Path]) -> None:
    found = compare(runs[0], runs[0])
    assert found["verdict"].startswith("The two cannot be told apart: A minus B is +0.0 points")
    assert found["settings"] == []


def test_runs_are_called_by_what_differs(tmp_path: Path, write_run: Write) -> None:
    found = compare(write_run(tmp_path / "robust" / "0"), write_run(tmp_path / "grpo" / "0"))
    assert (found["a"]["name"], found["b"]["name"]) == ("robust/0", "grpo/0")


def test_a_run_whose_name_begins_with_an_underscore_is_in_every_legend(tmp_path: Path, write_run: Write) -> None:
    text = write_comparison(write_run(tmp_path / "_old"), write_run(tmp_path / "new"))[0].read_text()
    assert text.count("> _old</text>") == text.count(">new</text>") > 5


def test_what_is_unfair_is_said(runs: tuple[Path, Path], bare_run: Path) -> None:
    found = compare(runs[0], bare_run)
    assert "The second run has not finished: its numbers are as far as it got." in found["warnings"]
    assert "cannot be held against each other" in found["verdict"]
    summary = json.loads((runs[1] / "summary.json").read_text())
    (runs[1] / "summary.json").write_text(json.dumps({**summary, "hardware": "a phone", "commit": "fffffff"}))
    words = " ".join(compare(*runs)["warnings"])
    assert "a phone" in words
    assert "commit 0123abc and fffffff" in words
    with pytest.raises(RunError, match="holds neither"):
        compare(runs[0], bare_run / "nothing")


def test_rates_of_different_splits_have_no_difference(runs: tuple[Path, Path]) -> None:
    """A rate on what was trained on is higher than one on what was held out, whichever run is the better."""
    for run, split in zip(runs, ("val", "held-out"), strict=True):
        summary = json.loads((run / "summary.json").read_text())
        summary["arms"]["off-policy"]["split"] = split
        (run / "summary.json").write_text(json.dumps(summary))
    found = compare(*runs)
    assert found["verdict"].startswith("The pass rates are of different tasks (fast: val; slow: held-out clients")
    assert [row["difference"] for row in found["rates"]] == [None, None]
    assert all(row["difference"] for row in found["splits"])


def test_difference_is_newcombes() -> None:
    """Examples of Newcombe 1998, table II, method 10."""
    for (x, m, y, n), ends in (((56, 70, 48, 80), (0.0524, 0.3339)), ((9, 10, 3, 10), (0.1705, 0.8090)),
                               ((10, 10, 0, 10), (0.6075, 1.0))):
        assert difference(wilson(x, m), wilson(y, n))[1:] == pytest.approx(ends, abs=1e-4)


def test_the_page_holds_both_and_nothing_foreign(runs: tuple[Path, Path]) -> None:
    path, found = write_comparison(*runs)
    assert found == compare(*runs)
    assert path == runs[0] / "compare-slow.html"
    text = path.read_text()
    page = assert_self_contained(text)
    words = " ".join(" ".join(page.words).split())
    for expected in ("fast against slow", "learn.lr", "0.001", "1e-05", "+43.0", "unseen clients", "Newcombe"):
        assert expected in words, expected
    assert [tag for tag, _ in page.tags].count("svg") == 4 + 1 + 6
    assert "Not recorded: learn/capped_frac." in words
    assert "var(--student)" in text
    assert "nan" not in words


def hostile(run: Path) -> Path:
    """The run with markup in every text that comes from files."""
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"command": HOSTILE, "commit": HOSTILE, "hardware": {HOSTILE: HOSTILE}}
    summary["arms"]["off-policy"]["splits"][HOSTILE] = summary["arms"]["off-policy"]["splits"]["val"]
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "arms" / "off-policy" / "config.toml").write_text(f"[learn]\nratio = '{HOSTILE}'\n")
    return run


def test_hostile_text_stays_text(runs: tuple[Path, Path]) -> None:
    text = write_comparison(hostile(runs[0]), runs[1])[0].read_text()
    assert_self_contained(text)
    assert "&lt;script&gt;" in text
    assert "<img" not in text


def test_no_text_of_a_run_drives_the_terminal(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J"
    config = runs[1] / "arms" / "off-policy" / "config.toml"
    config.write_text(f"[learn]\nratio = {json.dumps(evil)}\n")
    summary = json.loads((runs[1] / "summary.json").read_text())
    (runs[1] / "summary.json").write_text(json.dumps({**summary, "hardware": evil}))
    print_comparison(compare(*runs))
    assert "\x1b" not in capsys.readouterr().out


def run_verb(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "agentsdpo.cli", "report", *words], text=True, capture_output=True,
                          timeout=120)


def test_the_verb(runs: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = map(str, runs)
    done = run_verb(first)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{first}/report.html"
    both = run_verb(first, second, "-o", str(tmp_path / "deep" / "c.html"))
    assert (tmp_path / "deep" / "c.html").is_file()
    assert re.search(r"final pass +93\.0 % \[88\.0, 97\.0\] +50\.0 % \[41\.0, 59\.0\] +\+43\.0", both.stdout)
    assert "learn.lr: 0.001 against 1e-05" in both.stdout
    found = json.loads(run_verb(first, second, "--json").stdout)
    assert found["verdict"].startswith("fast passes more often")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.json").write_text("{}")
    for words, told in (((str(tmp_path / "bench"),), "is a benchmark run; use: agentsdpo bench report"),
                        ((first, str(tmp_path / "no")), "holds neither summary.json nor metrics.jsonl")):
        refused = run_verb(*words)
        assert (refused.returncode, refused.stdout, told in refused.stderr) == (1, "", True)
        assert refused.stderr.count("\n") == 1


@needs_browser
@pytest.mark.slow
def test_the_pages_in_a_browser(runs: tuple[Path, Path], tmp_path: Path) -> None:
    from agentsdpo.show.report import write_report

    written = [write_report(hostile(runs[0])), write_comparison(*runs)[0]]
    with browser(tmp_path) as driver:
        for path in written:
            for theme in pages.THEMES:
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {
                    "features": [{"name": "prefers-color-scheme", "value": theme}]})
                driver.get(path.as_uri())
                assert complaints(driver) == []
                assert driver.find_elements("css selector", "script, img") == []
                for summary in driver.find_elements("css selector", "details:not([open]) > summary"):
                    summary.click()
                assert min(contrasts(driver, "body *").values()) >= 4.2, contrasts(driver, "body *")
                assert driver.title.startswith("fast")
            driver.set_window_size(500, 900)
            assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
            driver.set_window_size(1400, 900)
