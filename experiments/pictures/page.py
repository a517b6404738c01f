"""Make docs/page.png, the picture of the server's page: `python -m experiments.pictures.page`.

It needs evoprune with its server, Selenium, and Chromium with its driver (`python -m experiments.environments serve`, and
`apt-get install chromium chromium-driver`), and takes a quarter of a minute.
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

FILE = Path(__file__).parents[2] / "docs/page.png"
SIZE = (1024, 1400)
SHOWN_S = 3.0  # time of the frame in the picture, in seconds
COLORS = 128
START_S = 60.0
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
# The lower border of the picture: the end of the panel about the visual tokens.
END = "return Math.ceil(document.getElementById('reading').getBoundingClientRect().bottom) + 16"


def main() -> None:
    command = [sys.executable, "-m", "evoprune_cli", "serve", "--port", "0"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,  # noqa: S603
    ):
        try:
            lines = iter(server.stderr.readline, "")
            url = next(found[1] for line in lines if (found := re.search(r"served at (\S+)", line)))
            picture = screenshot(url, Path(folder))
        finally:
            server.terminate()
    # This method keeps the rare colors of the shapes, unlike Pillow's usual one.
    few = picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    few.save(FILE, optimize=True)
    print(f"{FILE}: {picture.width} x {picture.height}, {FILE.stat().st_size} bytes")


def screenshot(url: str, folder: Path) -> Image.Image:
    """Return a picture of the page at `url` after it has answered the question about its sample clip."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS, f"--user-data-dir={folder}"):
        options.add_argument(option)
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        size = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        light = {"name": "prefers-color-scheme", "value": "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [light]})

        def until(condition: str) -> None:
            WebDriverWait(browser, START_S, 0.05).until(lambda _: browser.execute_script(f"return {condition}"))

        def click(name: str) -> None:
            until(f"document.getElementById('{name}').checkVisibility()")
            until(f"!document.getElementById('{name}').disabled")
            browser.find_element("id", name).click()

        browser.get(url)
        click("try")
        until("document.getElementById('legend').children.length")  # otherwise, the answer would wait for the overlay
        click("send")
        until("document.querySelector('#answers details')")
        browser.find_element("css selector", "#answers summary").click()
        click("search")
        until("document.querySelector('#moments button')")
        click("measure")
        until("!document.getElementById('ticks').textContent.includes('–')")
        until("!document.getElementById('reading-state').textContent")
        click("show")
        browser.execute_script(f"document.getElementById('video').currentTime = {SHOWN_S}")
        until(f"document.getElementById('time').textContent.startsWith('0:{SHOWN_S:04.1f}')")
        until("!document.getElementById('video').seeking")
        browser.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
        image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        return image.crop((0, 0, image.width, browser.execute_script(END)))


if __name__ == "__main__":
    main()
