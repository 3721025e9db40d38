"""The report: self-contained, escaped, readable, honest about what is missing."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agentsdpo import plots
from agentsdpo.errors import RunError
from agentsdpo.results import CONTROL_SPLIT
from agentsdpo.show import pages, report

HOSTILE = '"><script>alert(1)</script><img src=http://example.org/x onerror=alert(1)>'


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; complains about tags closed in the wrong order."""

    VOID = {"meta", "img", "link", "br"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory, write_run: Callable[[Path], Path]) -> str:
    path = report.write_report(write_run(tmp_path_factory.mktemp("runs") / "demo"))
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def assert_self_contained(text: str) -> Page:
    """No script, no event handler, nothing fetched, a policy that forbids it anyway; ids are unique."""
    page = Page(text)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    return page


def test_the_report_is_self_contained_and_well_formed(page_text: str) -> None:
    page = assert_self_contained(page_text)
    assert "http" not in re.sub(r'http-equiv', "", page_text)
    assert [tag for tag, _ in page.tags].count("svg") == 1 + 4 + 1 + 2 * 7


def test_the_report_says_what_was_run_and_what_came_out(page_text: str) -> None:
    words = " ".join(" ".join(Page(page_text).words).split())
    for expected in ("agentsdpo demo --seed 7", "0123abc", "cpu: 2 cores, ram_gib: 8", "max_staleness = 16",
                     "0.8 % [0.1, 4.3]", "93.0 % [88.0, 97.0]", "5 min 12 s", "untaught firm (control)",
                     "cannot be told from its zero-shot level", "at most 9", "unseen clients", "+92.2"):
        assert expected in words, expected
    assert "Not recorded: replay/staleness/p95" not in words
    assert "None" not in words
    assert "nan" not in words


def test_figures_take_their_colours_from_the_page(page_text: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", page_text, re.DOTALL)).lower()
    assert not [colour for colour in plots.ROLES.values() if colour in figures]
    assert "var(--student)" in figures
    assert "var(--ink)" in figures
    assert "#ffffff" not in figures


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", pages.THEMES)
def test_contrast_is_wcag_aa(theme: str) -> None:
    colours = pages.THEMES[theme]
    for ground in (colours["page"], colours["card"]):
        assert min(contrast(colours[text], ground) for text in ("text", "ink")) >= 4.5
        assert min(contrast(colours[role], ground) for role in ("student", "teacher", "behaviour", "hint")) >= 3.0


def test_bare_figures_read_on_light_and_dark() -> None:
    for ground in ("#ffffff", "#0d1117"):
        assert contrast(plots.ROLES["ink"], ground) >= 4.2
        assert min(contrast(colour, ground) for colour in plots.ROLES.values()) >= 3.0


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "arms" / "a").mkdir(parents=True)
    rows = [{"kind": "eval", "step": i, "split": HOSTILE, "decoding": HOSTILE, "pass": 0.5, "n": 4, "episodes": i}
            for i in (0, 1)]
    rows += [{**row, "decoding": "sampled"} for row in rows]
    (run / "arms" / "a" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "arms" / "a" / "config.toml").write_text(f"name = '{HOSTILE}'\n</pre>")
    split = {"final_pass": 0.5, "zero_shot_pass": 0.1, "n": 8}
    summary = {"command": f"{HOSTILE} \udcff.toml", "commit": HOSTILE, "hardware": {HOSTILE: HOSTILE}, "seed": HOSTILE,
               "arms": {"a": {"final_pass": 0.5, "splits": {HOSTILE: split}}, HOSTILE: {"final_pass": 0.4}}}
    (run / "summary.json").write_text(json.dumps(summary))
    text = report.write_report(run).read_text(encoding="utf-8")
    assert_self_contained(text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "<img" not in text


def test_a_killed_run_still_has_a_report(bare_run: Path) -> None:
    text = report.write_report(bare_run).read_text(encoding="utf-8")
    words = " ".join(" ".join(assert_self_contained(text).words).split())
    for expected in ("Not recorded: command, commit, seed, hardware.", "No configuration was stored",
                     "No split was evaluated", "it has not finished",
                     f"control split {CONTROL_SPLIT}", "learn/ratio/p99",
                     "Not recorded: pass rate against environment steps, pass rate against wall clock"):
        assert expected in words, expected


def test_a_minimal_summary_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"final_pass": 0.5, "steps": 3}')
    words = " ".join(Page(report.write_report(tmp_path).read_text(encoding="utf-8")).words)
    assert "50.0 %" in words
    assert "Not recorded: pass rate against episodes" in words


@pytest.mark.parametrize(("final", "warns"), [(0.02, False), (0.4, True)])
def test_a_gain_on_the_untaught_firm_is_a_warning(tmp_path: Path, final: float, warns: bool) -> None:
    split = {"zero_shot_pass": 0.01, "final_pass": final, "n": 100}
    (tmp_path / "summary.json").write_text(json.dumps({"arms": {"a": {"splits": {CONTROL_SPLIT: split}}}}))
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert ('class="warning"' in text) is warns
    assert ("look for a leak" in text) is warns


def test_a_loss_on_the_untaught_firm_is_no_standstill(tmp_path: Path) -> None:
    split = {"zero_shot_pass": 0.3, "final_pass": 0.0, "n": 64}
    (tmp_path / "summary.json").write_text(json.dumps({"arms": {"a": {"splits": {CONTROL_SPLIT: split}}}}))
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "fell below zero-shot, 30.0 % before and 0.0 % after training" in text
    assert "cannot be told from its zero-shot level" not in text


@pytest.mark.parametrize(("final", "gained"), [(0.93, True), (0.08, True), (0.05, False), (0.0, False), (None, False)])
def test_a_gain_is_told_only_where_the_rates_part(tmp_path: Path, final: float | None, gained: bool) -> None:
    control = {"zero_shot_pass": 0.01, "final_pass": 0.02, "n": 100}
    rates = {"zero_shot_pass": 0.01, "n": 100, **({} if final is None else {"final_pass": final})}
    (tmp_path / "summary.json").write_text(json.dumps({"arms": {"a": {**rates, "splits": {CONTROL_SPLIT: control}}}}))
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert ("The gain elsewhere is what was learned" in text) is gained
    assert ("No gain is shown elsewhere" in text) is not gained


def test_a_page_that_cannot_be_written_leaves_the_old_one(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.write_report(run_dir)
    before = path.read_text(encoding="utf-8")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (run_dir / "config.toml").write_text("other = 1\n")
    with pytest.raises(OSError, match="No space left"):
        report.write_report(run_dir)
    assert path.read_text(encoding="utf-8") == before
    assert not [p.name for p in run_dir.iterdir() if p.name.startswith(".")]


def test_one_training_run_has_a_report_with_its_settings_once(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('name = "first"\n')
    row = {"kind": "eval", "step": 0, "split": "val", "decoding": "sampled", "n": 16, "pass": 0.0, "episodes": 0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    text = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert text.count("name = &#34;first&#34;") == 1
    assert "arm first" in text


def test_readme_curve_states_baseline_staleness_and_n(run_dir: Path, tmp_path: Path) -> None:
    path = report.readme_curve(run_dir, tmp_path / "docs" / "curve.svg")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "<script" not in text
    for expected in ("Unseen clients (test_names)", "zero-shot 0.0 %", "oracle 100 %", "n = 128 episodes", "staleness",
                     "no-correction", "episodes collected"):
        assert expected in text, expected


def test_readme_curve_needs_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"final_pass": 0.5}')
    with pytest.raises(RunError, match="no evaluation"):
        report.readme_curve(tmp_path, tmp_path / "curve.svg")


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = ("import sys, agentsdpo.show.report, agentsdpo.show.console; "
            "print([m for m in ('matplotlib', 'jinja2', 'rich', 'torch') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
