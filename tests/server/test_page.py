"""The page in a real Chromium: the chat, what SMART does, and the race; on a desk and on a phone,
light and dark."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest
from browsing import (
    DESKTOP,
    FAULTS,
    PHONE,
    STORED,
    answers_with,
    ask,
    browser_page,
    chatting,
    ends,
    looks,
    needs_chromium,
    setting,
    streams,
)
from serving import NAME, Running, busy, serving, slow, wait_for

FILES = ("index.html", "style.css", "client.js", "conversations.js", "chat.js", "live.js")
# Of a tree with these labels: what is shown, where it ends, and where its probability begins.
LABELS = """async texts => {
  const {drawTree} = await import("/page/trees.js");
  const nodes = texts.map(text => [-1, text, 1, false]);
  const trees = document.getElementById("trees");
  const box = trees.appendChild(drawTree({id: 1, tokens: 1, before: "", own: "", nodes}));
  const found = [...box.querySelectorAll("text")].map(e => [e.textContent, e.getBBox()]);
  box.remove();
  return texts.map((_, i) => [found[2 * i], found[2 * i + 1]])
    .map(([[text, label], [, chance]]) => [text, label.x + label.width, chance.x]);
}"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"


def test_the_pages_files_are_open_and_nothing_beside_them(load: Any) -> None:
    with serving(load, api_keys=("k",)) as running:
        kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
        for name in FILES:
            found = httpx.get(f"{running.url}/page/{name}")
            assert found.status_code == 200
            assert found.headers["content-type"].startswith(kinds[name.rpartition(".")[2]])
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "require-trusted-types-for 'script'" in policy
        assert httpx.head(f"{running.url}/page/chat.js").status_code == 200
        page = httpx.get(running.url).text
        assert page.startswith("<!doctype html>")
        for name in ("chat.js", "nothing.js"):  # no parameter of the page
            assert httpx.get(f"{running.url}/?name={name}").text == page
        for name in ("", "nothing.js", "..%2fapp.py", "%2e%2e/app.py"):
            assert httpx.get(f"{running.url}/page/{name}").status_code == 404


# --- the chat ---


@needs_chromium
@looks
def test_a_conversation_by_keyboard(slowly: Running, size: tuple[int, int], scheme: str) -> None:
    """Written, stopped, gone on with, and there again after a reload; all without a pointer."""
    with chatting(slowly, size, scheme) as (page, bodies):
        assert page.evaluate(FAULTS) == []
        page.keyboard.type("abc")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("abc **not bold**")
        assert page.locator("article").count() == 0
        page.keyboard.press("Enter")
        streams(page)
        assert page.input_value("#question") == ""
        assert page.text_content("#send") == "Stop"
        page.keyboard.type("next")
        page.keyboard.press("Enter")  # not while an answer comes
        assert page.input_value("#question") == "next"
        page.keyboard.press("Escape")
        ends(page)
        assert slowly.idle()
        assert page.text_content(".given footer small") == "Stopped."
        assert page.text_content(".mine p") == "abc\nabc **not bold**"
        assert page.evaluate(FAULTS) == []

        page.keyboard.press("Enter")
        streams(page)
        page.keyboard.press("Tab")  # to the button
        page.keyboard.press("Enter")
        ends(page)
        first, second = bodies
        assert first["messages"] == [{"role": "user", "content": "abc\nabc **not bold**"}]
        answers = [answer for _, answer in page.evaluate(STORED)]
        assert second["messages"] == [
            *first["messages"],
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": "next"},
        ]
        assert all(answers)
        assert (second["temperature"], second["stream"]) == (0, True)

        shown = page.inner_text("#log")
        page.reload()
        streams(page)
        assert page.inner_text("#log") == shown
        assert page.evaluate("document.activeElement.id") == "question"
        for _ in range(20):
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.id") == "new":
                break
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        assert page.locator("article").count() == 0
        assert page.is_visible("#welcome")
        page.reload()
        assert page.locator("article").count() == 0


@needs_chromium
def test_an_answer_that_is_left_alone(slowly: Running) -> None:
    """Leaving the page keeps what has come of an answer, and so does a new chat; a stop before its
    first letter gives the question back, and an error in its middle is said below it."""
    with chatting(slowly) as (page, _):
        ask(page, "abc")
        streams(page)
        page.reload()
        streams(page, 10)
        assert slowly.idle()
        ask(page, "more")
        page.wait_for_selector("article:nth-of-type(4) .text > *")
        page.click("#new")
        ends(page)
        assert slowly.idle()
        assert page.locator("article").count() == 0
        assert page.input_value("#question") == ""
        page.click("#menu")
        page.click("#list button >> text=abc")
        assert page.locator("article").count() == 4
        assert page.text_content(".given:last-of-type footer small") == "Stopped."
        assert page.text_content(".given:last-of-type .text")

        page.click("#new")
        page.route("**/v1/chat/completions", lambda route: None)  # no answer at all
        ask(page, "a question")
        page.wait_for_selector("#chat.busy")
        page.keyboard.press("Escape")
        ends(page)
        assert page.input_value("#question") == "a question"
        assert page.text_content("#told") == "Stopped."
        assert page.locator("article").count() == 0
        page.press("#question", "Enter")
        page.wait_for_selector("#chat.busy")
        page.click("#new")
        ends(page)
        assert page.input_value("#question") == ""

        page.unroute("**/v1/chat/completions")
        answers_with(page, "half", {"error": {"message": "the engine has died"}})
        ask(page, "a question")
        ends(page)
        assert page.inner_text(".given .text") == "half"
        assert page.text_content(".given footer small") == "the engine has died"


@needs_chromium
def test_an_answer_that_ends_says_how_it_went_and_can_be_tried_again(load: Any) -> None:
    with (
        serving(lambda: slow(load(max_model_len=64), 0.002)) as running,
        chatting(running) as (page, bodies),
    ):
        page.fill("#question", "abcabcabc")
        page.click("#send")
        ends(page)
        note = page.text_content(".given footer small")
        tokens, right, guesses = re.fullmatch(
            r"(\d+) tokens · \d+ tokens/s · (\d+) of (\d+) guesses right · cut: no room .*", note
        ).groups()
        assert 20 < int(tokens) < 64
        assert 0 < int(right) <= int(guesses)
        before = page.text_content(".given .text")
        page.click(".given footer >> text=Try again")
        ends(page)
        assert bodies[0] == bodies[1]
        assert page.text_content(".given .text") == before
        assert page.locator("article").count() == 2


@needs_chromium
def test_an_answer_stays_until_another_one_comes(slowly: Running) -> None:
    """Of a second try that is refused, and of one that finds no server."""
    address = "**/v1/chat/completions"
    refusal = json.dumps({"error": {"message": "the queue is full"}})
    with chatting(slowly) as (page, _):
        for text in ("before", "old"):
            answers_with(page, text)
            ask(page, f"asked {text}")
            ends(page)
            page.unroute(address)
        stored = page.evaluate(STORED)
        assert stored == [["asked before", "before"], ["asked old", "old"]]
        kept = [*stored[0], *stored[1]]
        for fail in (
            lambda route: route.fulfill(status=429, content_type="application/json", body=refusal),
            lambda route: route.abort(),
        ):
            page.route(address, fail)
            page.click(".given:last-of-type footer >> text=Try again")
            page.wait_for_selector("#told:not([hidden])")
            ends(page)
            page.unroute(address)
            assert page.locator("article .text, article > p").all_inner_texts() == kept
            assert page.evaluate(STORED) == stored
            assert page.input_value("#question") == ""
        answers_with(page, "new")
        page.click(".given:last-of-type footer >> text=Try again")
        page.wait_for_selector(".given .text >> text=new")
        ends(page)
        assert page.locator("article .text, article > p").all_inner_texts() == [*kept[:3], "new"]


@needs_chromium
def test_a_question_that_comes_back_stands_before_a_draft(slowly: Running) -> None:
    with chatting(slowly) as (page, _):
        page.route("**/v1/chat/completions", lambda route: None)  # no answer at all
        ask(page, "a question")
        page.wait_for_selector("#chat.busy")
        page.fill("#question", "a draft")
        page.keyboard.press("Escape")
        ends(page)
        assert page.input_value("#question") == "a question\n\na draft"


@needs_chromium
@pytest.mark.parametrize("clipboard", [True, False])
def test_copy(slowly: Running, clipboard: bool) -> None:
    """With the clipboard that browsers give to https and to this machine, and without."""
    script = "" if clipboard else "delete Navigator.prototype.clipboard"
    text = "An *answer*:\n\n```python\nif a < b:\n    pass\n```"
    with chatting(slowly, script=script) as (page, _):
        if clipboard:
            page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        assert page.evaluate("Boolean(navigator.clipboard)") is clipboard
        answers_with(page, text)
        ask(page, "a question")
        ends(page)
        for button, copied in ((".bar button", "if a < b:\n    pass"), ("footer button", text)):
            page.locator(f".given {button}").first.click()
            page.wait_for_selector(f".given {button} >> text=Copied")
            page.fill("#question", "")
            page.focus("#question")
            page.keyboard.press("Control+V")
            assert page.input_value("#question") == copied


@needs_chromium
@looks
def test_an_answers_markdown_fits_and_its_html_is_not_run(
    slowly: Running, size: tuple[int, int], scheme: str
) -> None:
    text = (
        '# Title\n\n<img src=x onerror="window.attacked = 1">\n'
        "<script>window.attacked = 1</script>\n\n"
        f"- {'long' * 60}\n- [x](javascript:window.attacked=1)\n\n```\n{'wide ' * 60}\n```\n\n"
        f"|{' column |' * 20}\n|{'---|' * 20}\n|{' cell |' * 20}\n\n**end**"
    )
    with chatting(slowly, size, scheme) as (page, _):
        answers_with(page, text)
        ask(page, f"{'a question ' * 30}<b>")
        page.wait_for_selector(".given strong")
        assert page.evaluate(FAULTS) == []
        assert page.locator(".given :is(img, script, a)").count() == 0
        assert "<script>" in page.inner_text(".given")
        assert page.inner_text(".mine").endswith("<b>")
        page.reload()
        page.wait_for_selector(".given strong")
        assert page.evaluate("window.attacked") is None


@needs_chromium
def test_what_is_refused_is_said_and_the_question_comes_back(load: Any) -> None:
    with (
        serving(lambda: slow(load(), 0.04), api_keys=("k",)) as running,
        chatting(running) as (page, bodies),
    ):
        ask(page, "abc")
        page.wait_for_selector("#told >> text=API key")
        assert page.input_value("#question") == "abc"
        assert page.locator("article").count() == 0
        page.fill("#key input", "k")
        page.press("#key input", "Enter")
        page.wait_for_selector("#key", state="hidden")
        setting(page, temperature="99")
        page.press("#question", "Enter")
        page.wait_for_selector("#told >> text=temperature")
        setting(page, temperature="0", system="Be brief.")
        page.press("#question", "Enter")
        streams(page)
        page.keyboard.press("Escape")
        ends(page)
        assert not page.is_visible("#told")
        assert bodies[-1]["temperature"] == 0
        system, user = bodies[-1]["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert user["content"] == "abc"
        page.reload()  # the key is known to this tab, and the settings to this browser
        page.click("#settings summary")
        assert page.input_value("#system") == "Be brief."
        page.fill("#temperature", "")
        running.worker.draining = True
        ask(page, "more")
        page.wait_for_selector("#told >> text=shutting down")
        assert page.input_value("#question") == "more"
        assert "temperature" not in bodies[-1]
        running.worker.draining = False


@needs_chromium
def test_a_full_context_loses_its_oldest_turns(load: Any) -> None:
    """The page says so, and keeps them; the system prompt stays."""
    with (
        serving(lambda: slow(load(max_model_len=320), 0.03)) as running,
        chatting(running) as (page, bodies),
    ):
        setting(page, system="S")
        for letter in "abc":
            ask(page, letter * 90)
            streams(page, 4)
            page.keyboard.press("Escape")
            ends(page)
        assert page.locator(".given").count() == 3
        sent = [body["messages"] for body in bodies]
        assert len(sent) == 4  # the third question was refused once
        assert [each["content"][0] for each in sent[2] if each["role"] == "user"] == ["a", "b", "c"]
        assert [each["content"][0] for each in sent[3] if each["role"] == "user"] == ["b", "c"]
        assert sent[3][0]["content"] == "S"
        assert page.is_visible("#beyond")
        assert page.evaluate("document.querySelectorAll('#beyond ~ article').length") == 4
        page.reload()
        assert page.evaluate("document.querySelectorAll('#beyond ~ article').length") == 4


@needs_chromium
def test_thoughts_are_folded_and_not_sent_back(slowly: Running) -> None:
    with chatting(slowly) as (page, bodies):
        answers_with(page, "<think>\nhm\n</think>\n\nYes.")
        ask(page, "a question")
        ends(page)
        assert page.inner_text(".given .text") == "Yes."
        page.click(".given summary")
        assert page.inner_text(".given details p") == "hm"
        ask(page, "another")
        ends(page)
        assert bodies[1]["messages"][1] == {"role": "assistant", "content": "Yes."}


@needs_chromium
def test_a_model_without_a_template_continues_text(load: Any) -> None:
    def untaught() -> Any:
        llm = slow(load(), 0.04)
        llm.tokenizer.template = None
        return llm

    with serving(untaught) as running, chatting(running) as (page, bodies):
        page.wait_for_selector("#no-template")
        ask(page, "abc")
        streams(page)
        page.keyboard.press("Escape")
        ends(page)
        assert bodies[0]["prompt"] == "abc"


@needs_chromium
def test_a_broken_store_or_none_is_an_empty_chat(slowly: Running) -> None:
    for script in (
        "localStorage.setItem('smart.chat', '{\"messages\": [{\"role\": 1}]}')",
        "localStorage.setItem('smart.chat', '{')",
        "localStorage.setItem('smart.chat.1', 'null')",
        """localStorage.setItem('smart.chat.1', '{"turns": [{"question": 1, "answer": ""}]}')""",
        "localStorage.setItem('smart.settings', 'null')",
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('forbidden') }})",
    ):
        with browser_page(DESKTOP) as page:
            page.add_init_script(script)
            page.goto(slowly.url)
            page.wait_for_selector("#state.live")
            ask(page, "abc")
            streams(page)


# --- what SMART does ---


@needs_chromium
def test_a_page_costs_nothing_while_nobody_can_see_its_pictures(slowly: Running) -> None:
    live = slowly.llm.engine_thread.observers[-1]
    with browser_page(PHONE) as page:
        page.goto(slowly.url)
        page.wait_for_selector("#state >> text=ready")
        assert page.get_attribute("body", "data-view") == "chat"
        assert wait_for(lambda: not live.watchers)
        for view, watchers in (("live", 1), ("chat", 0), ("race", 1)):
            page.click(f"#views [data-view={view}]")
            assert wait_for(lambda watchers=watchers: live.watchers.total() == watchers)
        page.click("#pause")
        assert wait_for(lambda: not live.watchers)
        page.reload()
        assert page.get_attribute("body", "data-view") == "race"
        assert wait_for(lambda: live.watchers.total() == 1)
    assert wait_for(lambda: not live.watchers)


@needs_chromium
@looks
def test_the_live_view(load: Any, size: tuple[int, int], scheme: str) -> None:
    """It loads without errors, moves while a request runs, rests when told to, keeps the last
    result, and comes back after the server was away."""
    with browser_page(size, scheme) as page:
        with serving(lambda: slow(load(), 0.04)) as running:
            port = int(running.url.rpartition(":")[2])
            page.goto(running.url)
            page.click("#views [data-view=live]")
            page.wait_for_selector("#state.live")
            assert page.is_visible("#question") == (size == DESKTOP)
            labels = page.evaluate(LABELS, ["short", "W" * 12, "漢字" * 6, "😀" * 9, "👨‍👩‍👧" * 3])
            assert labels[0][0] == "short"
            for text, end, chance in labels:
                assert end + 2 < chance, text
                assert len(text) > 2
            assert f'"model": "{NAME}"' in page.text_content("#hint")
            assert page.is_visible("#hint")
            assert "Nothing has run" in page.text_content("#words")
            changed = "old => document.querySelector('#trees p i').textContent !== old"
            with busy(running):
                page.wait_for_selector("#trees rect")
                page.wait_for_selector("#hint", state="hidden")
                page.wait_for_function(changed, arg=page.text_content("#trees p i"))
                assert float(page.text_content("#tps")) > 0
                assert float(page.text_content("#yield")) >= 1
                assert float(page.text_content("#expected")) >= 1
                assert "guesses ahead" in page.text_content("#words")
                page.wait_for_selector("#trees rect.accepted, #trees rect.rejected")
                page.wait_for_selector("#speed polyline")
                assert page.locator("#round polyline").count() == 2
                assert page.evaluate(
                    "[...document.querySelectorAll('#modes .drafting')]"
                    ".some(e => e.getBBox().height > 0)"
                )
                page.click("#pause")
                page.wait_for_selector("#state >> text=paused")
                still = page.inner_html("main")
                page.wait_for_timeout(700)
                assert page.inner_html("main") == still
                page.click("#pause")
                page.wait_for_function(changed, arg=page.text_content("#trees p i"))
            assert page.evaluate(FAULTS) == []
            page.wait_for_function(
                "() => document.querySelector('#words').textContent.startsWith('Quiet')"
            )
            assert float(page.text_content("#tps")) > 0  # the last result stays
            assert page.locator("#trees .tree").count() == 1
            background = sum(page.evaluate(BACKGROUND))
            assert background > 600 if scheme == "light" else background < 120
        page.wait_for_selector("#state.lost")
        with serving(load, port=port):
            page.wait_for_selector("#state.live")


# --- the race ---


@needs_chromium
def test_a_race(load: Any) -> None:
    """The same answer twice, through the ordinary route and with its key: with drafts, then
    plainly; then both are shown from the start."""
    with (
        browser_page(DESKTOP) as page,
        serving(lambda: slow(load(), 0.04), api_keys=("k",)) as running,
    ):
        bodies: list[dict[str, Any]] = []
        page.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data)))
        page.goto(running.url)
        page.fill("#key input", "k")
        page.press("#key input", "Enter")
        page.wait_for_selector("#state.live")
        page.click("#views [data-view=race]")
        page.fill("#ask textarea", "abcabcabc")
        page.press("#ask textarea", "Enter")
        page.wait_for_selector("#lane-plain pre span")
        assert page.locator("#lane-smart pre span").count() < 160  # it has begun again
        page.wait_for_selector("#replay")
        smart, plain = (page.text_content(f"#lane-{name} pre") for name in ("smart", "plain"))
        assert smart == plain != ""
        verdict = page.text_content("#verdict")
        assert re.search(r"was [\d.]+ times as fast. The two answers are the same", verdict)
        passes = [
            int(re.search(r"in (\d+) passes", page.text_content(f"#lane-{name} > small"))[1])
            for name in ("smart", "plain")
        ]
        assert passes[0] < passes[1]  # a pass with drafts gives more than one token at times
        assert re.search(r"; \d+ of \d+ guesses right$", page.text_content("#lane-smart > small"))
        assert "guesses" not in page.text_content("#lane-plain > small")
        assert [body["speculate"] for body in bodies] == [True, False]
        assert page.evaluate(FAULTS) == []
        page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        page.wait_for_timeout(500)  # the charts are drawn anew
        assert page.evaluate(FAULTS) == []
        page.click("#replay")
        page.wait_for_selector("#replay", state="visible")
        assert page.text_content("#verdict") == verdict
        assert len(bodies) == 2  # the replay asks for nothing
        page.click("#ask button.main")
        page.wait_for_selector("#lane-smart pre span")
        page.click("#ask button.main")  # Stop: the request ends with it
        page.wait_for_function(
            "() => document.querySelector('#verdict').textContent === 'Stopped.'"
        )
        assert running.idle()
        running.worker.draining = True  # what is refused is said
        page.click("#ask button.main")
        page.wait_for_function(
            "() => document.querySelector('#verdict').textContent.includes('shutting down')"
        )
        running.worker.draining = False
