"""Answers' markdown as the page draws it, in a real Chromium: the forms, and hostile text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browsing import DESKTOP, browser_page, needs_chromium
from serving import Running

pytestmark = needs_chromium
DRAW = """async texts => {
  const {show} = await import("/page/markdown.js");
  const box = document.body.appendChild(document.createElement("div"));
  box.className = "text";
  for (const text of texts) show(box, text);
  document.body.offsetHeight;  // laid out, too
  return [box.innerHTML, box.innerText];
}"""


@pytest.fixture(scope="module")
def page(running: Running) -> Iterator[Any]:
    with browser_page(DESKTOP) as page:
        page.goto(running.url)
        page.evaluate("window.attacked = 0")
        yield page


@pytest.fixture
def draw(page: Any) -> Iterator[Callable[..., list[str]]]:
    """Draws a text, or one after the other as a stream would; returns HTML and visible text."""
    yield lambda *texts: page.evaluate(DRAW, list(texts))
    page.evaluate("document.querySelectorAll('body > .text').forEach(box => box.remove())")


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# A\n### B *c*", "<h3>A</h3><h5>B <em>c</em></h5>"),
        (
            "**b** *i* ***bi*** ~~d~~ `c*d*`",
            "<p><strong>b</strong> <em>i</em> <em><strong>bi</strong></em> <del>d</del> "
            "<code>c*d*</code></p>",
        ),
        ("**a *b* c** and _d_", "<p><strong>a <em>b</em> c</strong> and <em>d</em></p>"),
        ("2 * 3 * 4, snake_case_name, ~5, 2**", "<p>2 * 3 * 4, snake_case_name, ~5, 2**</p>"),
        (r"\*no\* and C:\path, \(x\)", r"<p>*no* and C:\path, \(x\)</p>"),
        ("`` a`b `` and `open", "<p><code>a`b</code> and `open</p>"),
        (
            "- a\n- b\n  - c\n\n    more\n- d",
            "<ul><li>a</li><li>b<ul><li>c<p>more</p></li></ul></li><li>d</li></ul>",
        ),
        ("1. a\n   - x\n2. b", '<ol start="1"><li>a<ul><li>x</li></ul></li><li>b</li></ol>'),
        (
            "3) c\n\ntext\n4) d",
            '<ol start="3"><li>c</li></ol><p>text</p><ol start="4"><li>d</li></ol>',
        ),
        ("text:\n* a\n* **b**: c", "<p>text:</p><ul><li>a</li><li><strong>b</strong>: c</li></ul>"),
        ("> q\n> - a\n\nb", "<blockquote><p>q</p><ul><li>a</li></ul></blockquote><p>b</p>"),
        ("a\n\n---\n***", "<p>a</p><hr><hr>"),
        (
            "| a | b |\n|---|--:|\n| *1* | x\\|y |\n| 2 |\n\nend",
            '<div class="table"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead>'
            '<tbody><tr><td><em>1</em></td><td class="right">x|y</td></tr>'
            '<tr><td>2</td><td class="right"></td></tr></tbody></table></div><p>end</p>',
        ),
        ("a | b\nno table", "<p>a | b<br>no table</p>"),
        ("one<br>two", "<p>one<br>two</p>"),
        (
            '[a *b*](https://x.org/p_(q) "t") ![pic](http://y.org/i.png)',
            '<p><a href="https://x.org/p_(q)">a <em>b</em></a> '
            '<a href="http://y.org/i.png">pic</a></p>',
        ),
        (
            "see https://x.org/a_b_c.",
            '<p>see <a href="https://x.org/a_b_c">https://x.org/a_b_c</a>.</p>',
        ),
        ("[no](relative) [b]", "<p>[no](relative) [b]</p>"),
    ],
)
def test_forms(draw: Callable[..., list[str]], text: str, html: str) -> None:
    assert re.sub(r' (title|target|rel)="[^"]*"', "", draw(text)[0]) == html


def test_a_link_says_where_it_leads_and_takes_nothing_along(draw: Callable[..., list[str]]) -> None:
    html, _ = draw("[docs](https://x.org/a)")
    for name in ('title="https://x.org/a"', 'rel="noopener noreferrer nofollow"'):
        assert name in html


def test_code_keeps_every_letter(draw: Callable[..., list[str]]) -> None:
    html, _ = draw('- x\n\n  ```python title\n  if a < b:\n\n      print("*")\n  ```\n- y')
    assert '<pre><code>if a &lt; b:\n\n    print("*")</code></pre>' in html
    assert "<span>python</span>" in html
    assert html.endswith("<li>y</li></ul>")
    assert "<pre><code>a\n``</code></pre>" in draw("~~~\na\n``")[0]  # not closed yet


TEXT = """# T

An *answer* with `code`:

```js
a < b
```

1. one
2. two
   - x

| a | b |
|---|---|
| 1 | 2 |

End."""


def test_a_stream_ends_as_the_whole_does_and_leaves_finished_blocks(
    draw: Callable[..., list[str]],
) -> None:
    whole = draw(TEXT)
    assert draw(*[TEXT[:i] for i in range(1, len(TEXT) + 1)]) == whole
    assert "<table>" in whole[0]


HOSTILE = [
    "<script>attacked++</script>",
    "<img src=x onerror=attacked++>",
    "<svg/onload=attacked++><iframe srcdoc='<script>parent.attacked++</script>'>",
    "[x](javascript:attacked++) [y](JaVaScRiPt:attacked++)",
    "[z](data:text/html,<script>attacked++</script>)",
    "[x]( java\nscript:attacked++) <javascript:attacked++> [v](vbscript:x) [f](file:///etc/passwd)",
    "![x](https://evil.example/steal.png) ![y](data:image/svg+xml,<svg/onload=attacked++>)",
    '[a](https://x.org/"onmouseover="attacked++)',
    "[b](https://x.org '><script>attacked++</script>')",
    "```<img src=x onerror=attacked++>\n<script>attacked++</script>\n```",
    "```\n</code></pre><script>attacked++</script>",
    "| <img src=x onerror=attacked++> | b |\n|---|---|\n| </td><script>attacked++</script> | 1 |",
    "# <style>*{display:none}</style>",
    "`<script>attacked++</script>` **<b onclick=attacked++>x</b>**",
    "<a href='javascript:attacked++'>x</a> <https://x.org/<script>attacked++</script>>",
    "&lt;script&gt; &#60;img src=x onerror=attacked++&#62;",
    '<meta http-equiv="refresh" content="0;url=https://evil.example"><base href="https://evil.example">',
]


TAGS = {"P", "A", "BR", "CODE", "STRONG", "PRE", "DIV", "SPAN", "BUTTON", "H3"}
TABLE_TAGS = {"TABLE", "THEAD", "TBODY", "TR", "TH", "TD"}
NAMES = {"class", "type", "aria-label", "href", "title", "target", "rel", "http:", "https:"}
# Of each element below the answer: its tag, its attributes' names, and a link's protocol.
DRAWN = """() => [...document.querySelectorAll("body > .text *")].map(
  e => [e.tagName, ...e.getAttributeNames(), ...(e.href ? [new URL(e.href).protocol] : [])])"""


@pytest.mark.parametrize("text", HOSTILE)
def test_html_is_shown_and_not_run(page: Any, draw: Callable[..., list[str]], text: str) -> None:
    _, seen = draw(text)
    for tag, *names in page.evaluate(DRAWN):
        assert tag in TAGS | TABLE_TAGS
        assert set(names) <= NAMES
    for anchor in page.locator("body > .text a").all():
        anchor.dispatch_event("mouseover")
    assert page.evaluate("window.attacked") == 0
    if "attacked" in text and "](" not in text.replace("](x)", ""):
        assert "attacked" in seen  # it is there to be read


# Milliseconds that a text takes, without the browser's own work on what comes of it.
TIMED = """async text => {
  const {show} = await import("/page/markdown.js");
  const began = performance.now();
  show(document.createElement("div"), text);
  return performance.now() - began;
}"""
N = 100_000
BOMBS = {
    "openers": "*a " * N,
    "pairs": "**a*_b_~~" * N,
    "closers": "_a " * N + "b* " * N,
    "nested": "*a " * N + "a* " * N,
    "brackets": "[" * N + "](x)" * N,
    "links": "[a](" * N,
    "parentheses": "https://x.org/" + ")" * N,
    "ticks": " ".join("`" * (i % 300) for i in range(20_000)),
    "quotes": ">" * N,
    "lists": "\n".join(" " * i + "- a" for i in range(3000)),
    "items": "- " * N,
    "table": "|" * N + "\n" + "|-" * N,
    "rule": "- " * N + "x",
    "spaces": "# a" + " " * N + "b\n" + " " * N + "x",
    "fences": "```\n" * N,
    "angles": "<a" * N,
    "lines": "a\n" * N,
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_text_holds_up_the_page(page: Any, draw: Callable[..., list[str]], name: str) -> None:
    assert page.evaluate(TIMED, BOMBS[name]) < 6000  # a quadratic pattern takes much longer
    assert draw(BOMBS[name][:20_000])[0]  # nor is anything nested too deep for the browser
