"""Writes docs/images/live.png: the page of `smart serve` while it answers.

    python tools/record_page.py

Needs playwright (PyPI) and chromium (Debian), and 93 MB for the model on first use.

Needed by docs/serving.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "live.png"
MODEL = "smollm2-135m"
PORT = 8765
SIZE = {"width": 1280, "height": 1000}
QUESTIONS = (
    "List the months of the year.",
    "What are tides? Explain in a few sentences.",
    "Write a Python function is_even(n) with a docstring.",
)
BUSY = "document.querySelector('#chat.busy')"
# A tree worth a look: several guesses, of which some were right.
GOOD = """document.querySelectorAll("#trees rect").length > 5 &&
  document.querySelectorAll("#trees rect.accepted").length > 1"""


@contextmanager
def server() -> Iterator[str]:
    """Serve the model; yield the address once it answers."""
    url = f"http://localhost:{PORT}"
    module = "smart_decoding.cli.main"
    process = subprocess.Popen([sys.executable, "-m", module, "serve", MODEL, "--port", str(PORT)])
    try:
        while not _answers(f"{url}/health"):
            if process.poll() is not None:
                raise SystemExit("the server has ended")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url).status == 200
    except urllib.error.URLError:
        return False


def record(page: Page, url: str) -> None:
    """Ask, and take the picture in the middle of the last answer."""
    page.goto(url)
    page.wait_for_selector("#state.live")
    for question in QUESTIONS:
        page.fill("#question", question)
        page.press("#question", "Enter")
        page.wait_for_selector("#chat:not(.busy)")
    while not page.evaluate(f"{BUSY} && {GOOD}"):
        page.click(".given:last-of-type >> text=Try again")
        page.wait_for_timeout(500)
        page.wait_for_function(f"() => !{BUSY} || ({GOOD})")
    page.click("#pause")
    page.screenshot(path=OUTPUT)


def main() -> None:
    """Write the picture."""
    with server() as url, sync_playwright() as playwright:
        chromium = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        record(browser.new_page(viewport=SIZE, color_scheme="light"), url)
        browser.close()


if __name__ == "__main__":
    main()
