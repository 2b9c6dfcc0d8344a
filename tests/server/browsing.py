"""Pages of a real Chromium (Debian: chromium; PyPI: playwright), what must hold on each, and what
a reader does there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from serving import Running

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
DESKTOP, PHONE = (1280, 800), (390, 844)
looks = pytest.mark.parametrize(
    ("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"]
)
STORED = """JSON.parse(localStorage.getItem(sessionStorage.getItem("smart.open"))).turns
  .map(turn => [turn.question, turn.answer])"""  # of the open conversation
# Of texts that overlap others, of what is cut off, and of what scrolls sideways: a page has none.
FAULTS = """() => {
  const texts = "h1, h2, h3, b, small, button, textarea, label, svg text, header span, .say, " +
    "#words, .mine p, .text > *";
  const boxes = "#log, #panel, #chats";  // which scroll
  const drawer = document.querySelector(":popover-open");  // it may cover others
  const seen = [...(drawer || document).querySelectorAll(texts)]
    .filter(e => e.checkVisibility() && (e.textContent.trim() || e.value) && !e.closest(".tree"))
    .map(e => [e, shown(e)]).filter(([_, p]) => p.right - p.left > 1 && p.bottom - p.top > 3);
  function shown(e) {
    let {left, right, top, bottom} = e.getBoundingClientRect();
    for (let box = e.closest(boxes); box; box = null) {
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
  for (const box of [document.documentElement, ...document.querySelectorAll(boxes)])
    if (box.scrollWidth > box.clientWidth) faults.push(`sideways: ${box.id || "page"}`);
  return faults;
}"""


@contextmanager
def browser_page(size: tuple[int, int], scheme: str = "light") -> Iterator[Any]:
    """A page. It and the further ones of its context must have had no error, loaded nothing from
    elsewhere, and tried nothing that their security policy forbids."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        context.set_default_timeout(15_000)
        faults: list[str] = []
        hosts: set[str] = set()
        context.on("weberror", lambda error: faults.append(str(error.error)))
        context.on(
            "console", lambda said: "Content Security" in said.text and faults.append(said.text)
        )
        context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        yield context.new_page()
        browser.close()
    assert faults == []
    assert hosts == {"127.0.0.1"}


# --- a chat ---


@contextmanager
def chatting(
    running: Running,
    size: tuple[int, int] = DESKTOP,
    scheme: str = "light",
    script: str = "",
) -> Iterator[Any]:
    """A page with the bodies of its requests. script: runs before the page's own."""
    with browser_page(size, scheme) as page:
        page.add_init_script(script)
        bodies: list[dict[str, Any]] = []
        page.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data)))
        page.goto(running.url)
        yield page, bodies


def setting(page: Any, **values: str) -> None:
    """Fill in settings."""
    page.click("#settings summary")
    for name, value in values.items():
        page.fill(f"#{name}", value)
    page.click("#settings summary")


def answers_with(page: Any, text: str, *more: Any) -> None:
    """Let the server's next answers be this text, and further events."""
    first = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in (first, *more))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def streams(page: Any, letters: int = 20) -> None:
    """Wait until the last answer has some letters."""
    page.wait_for_function(
        "n => [...document.querySelectorAll('.given .text')].at(-1)?.textContent.length > n",
        arg=letters,
    )


def ends(page: Any) -> None:
    page.wait_for_selector("#chat:not(.busy)")
