"""Chromium for tests of web pages. It has to be installed, and is used without a display."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

SKIPPED = None
if find_spec("selenium") is None:
    SKIPPED = "selenium is not installed: python -m experiments.environments serve"
elif not (shutil.which("chromium") and shutil.which("chromedriver")):
    SKIPPED = "there is no Chromium with its driver: apt-get install chromium chromium-driver"
in_browser = pytest.mark.skipif(SKIPPED is not None, reason=SKIPPED or "")
QUIET = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
)  # fmt: skip


class Browser:
    """Chromium with a page open. `requests`: the URLs that it requested."""

    def __init__(self, driver):
        self.driver = driver
        self.width = 1280

    @property
    def requests(self) -> set[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each for each in events if each["method"] == "Network.requestWillBeSent"]
        return {each["params"]["request"]["url"] for each in sent}

    def get(self, name: str):
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        return self.get(name).text

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def until(self, true, seconds: float = 60.0):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.02).until(lambda driver: true())

    @property
    def severe(self) -> list[str]:
        """The error messages of the page's scripts and requests since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def look(self, dark: bool = False, width: int = 1280) -> None:
        """Set light or dark colors, and the width of the window."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.width = width
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def check_access(self) -> None:
        """Check that no axe-core rule is broken, and that the page is not wider than the window."""
        assert self.driver.execute_script("return document.documentElement.scrollWidth") <= self.width
        found = find_spec("axe_playwright_python")
        if found is None:
            return
        self.driver.execute_script((Path(found.origin).parent / "axe.min.js").read_text("utf-8"))
        result = self.driver.execute_async_script("axe.run(document).then(arguments[0])")
        problems = [(each["impact"], each["id"], each["nodes"][0]["html"]) for each in result["violations"]]
        assert problems == []


@contextmanager
def chromium(folder: Path) -> Iterator:
    """Start Chromium with a new profile in `folder`, and yield its driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*QUIET, f"--user-data-dir={folder / 'browser'}"):
        options.add_argument(option)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()
