"""Debian's Chromium, headless and without a network, for the pages this package writes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1400,900")


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """A fresh browser whose profile lies in ``folder``."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def complaints(driver: Any) -> list[str]:
    """What the page's scripts and its content policy complained about."""
    return [entry["message"] for entry in driver.get_log("browser") if "favicon" not in entry["message"]]



def contrasts(driver: Any, selector: str) -> dict[str, float]:
    """Contrast of every visible text to what lies behind it, WCAG 2.2, by element."""
    return driver.execute_script(Path(__file__).with_name("contrast.js").read_text(), selector)
