"""Pages of a real Chromium (Debian: chromium; PyPI: playwright), and what must hold on each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
DESKTOP, PHONE = (1280, 800), (390, 844)
# Of texts that overlap others, of what is cut off, and of what scrolls sideways: a page has none.
FAULTS = """() => {
  const texts = "h1, h2, h3, b, small, button, textarea, label, svg text, header span, .say, " +
    "#words, .mine p, .text > *";
  const seen = [...document.querySelectorAll(texts)]
    .filter(e => e.checkVisibility() && (e.textContent.trim() || e.value) && !e.closest(".tree"))
    .map(e => [e, shown(e)]).filter(([_, p]) => p.right - p.left > 1 && p.bottom - p.top > 3);
  function shown(e) {
    let {left, right, top, bottom} = e.getBoundingClientRect();
    for (let box = e.closest("#log, #panel"); box; box = null) {
      const outer = box.getBoundingClientRect();
      [top, bottom] = [Math.max(top, outer.top), Math.min(bottom, outer.bottom)];
    }
    return {left, right, top, bottom};
  }
  const faults = [];
  seen.forEach(([a, p], i) => {
    if (p.left < 0 || p.right > innerWidth + .5) faults.push(`cut off: ${a.textContent}`);
    for (const [b, q] of seen.slice(i + 1)) {
      if (a.contains(b) || b.contains(a)) continue;
      if (Math.min(p.right, q.right) - Math.max(p.left, q.left) > 1 &&
          Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top) > 3)
        faults.push(`${a.textContent} / ${b.textContent}`);
    }
  });
  for (const box of [document.documentElement, ...document.querySelectorAll("#log, #panel")])
    if (box.scrollWidth > box.clientWidth) faults.push(`sideways: ${box.id || "page"}`);
  return faults;
}"""


@contextmanager
def browser_page(size: tuple[int, int], scheme: str = "light") -> Iterator[Any]:
    """A page; at its end it must have had no error, loaded nothing from elsewhere, and tried
    nothing that its security policy forbids."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        viewport = {"width": size[0], "height": size[1]}
        page = browser.new_page(viewport=viewport, color_scheme=scheme)
        page.set_default_timeout(15_000)
        faults: list[str] = []
        hosts: set[str] = set()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console", lambda said: "Content Security" in said.text and faults.append(said.text)
        )
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        yield page
        browser.close()
    assert faults == []
    assert hosts == {"127.0.0.1"}
