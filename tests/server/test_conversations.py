"""The page's list of conversations in a real Chromium: kept, opened, deleted, shared by tabs, and
dropped where the browser's storage is full."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from browsing import (
    DESKTOP,
    FAULTS,
    STORED,
    answers_with,
    ask,
    chatting,
    ends,
    looks,
    needs_chromium,
    streams,
)
from serving import Running

pytestmark = needs_chromium
ROUTE = "**/v1/chat/completions"
HOSTILE = "<img src=x onerror='window.attacked = 1'>\n\u202e“quoted” " + "long" * 200
# What the storage has room for is taken by another page of this origin.
FILL = """() => {
  for (let size = 3e6; size >= 1; size = Math.floor(size / 2)) {
    try {
      localStorage.setItem("filler", (localStorage.getItem("filler") || "") + "x".repeat(size));
      size *= 2;
    } catch { /* half as much */ }
  }
}"""


def titles(page: Any) -> list[str]:
    return page.locator("#list li > :first-child").all_text_contents()


def shown(page: Any) -> list[str]:
    """The texts of the open conversation."""
    return page.locator("article .text, article > p").all_inner_texts()


def converse(page: Any, question: str, text: str) -> None:
    """A turn whose answer is this text."""
    answers_with(page, text)
    ask(page, question)
    page.wait_for_function(
        "text => [...document.querySelectorAll('.given .text')].at(-1)?.innerText === text",
        arg=text,
    )
    ends(page)
    page.unroute(ROUTE)


def chat(page: Any, *turns: tuple[str, str]) -> None:
    """A new conversation."""
    page.click("#new")
    for question, text in turns:
        converse(page, question, text)


def view_chats(page: Any) -> None:
    """Only the chat, and the list beside it."""
    page.click("#views [data-view=chat]")


def holding(page: Any) -> list[Any]:
    """The requests for answers, which get none before the test gives one."""
    held: list[Any] = []
    page.route(ROUTE, lambda route: held.append(route))
    return held


def release(page: Any, held: list[Any], text: str) -> None:
    event = {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(event)}\n\n"
    while not held:
        page.wait_for_timeout(20)
    held.pop().fulfill(content_type="text/event-stream", body=body)
    ends(page)


def press_until(page: Any, key: str, selector: str) -> None:
    """Move the focus by keyboard."""
    for _ in range(30):
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            return
        page.keyboard.press(key)
    pytest.fail(f"{key} does not reach {selector}")


@looks
def test_conversations_by_keyboard(running: Running, size: tuple[int, int], scheme: str) -> None:
    """Two are begun, opened, reloaded and deleted; all without a pointer, in a column on a desk
    and in a drawer on a phone."""

    def to_list(selector: str) -> None:
        if size == DESKTOP:
            press_until(page, "Shift+Tab", "#list li:last-child :last-child")
        else:
            press_until(page, "Shift+Tab", "#menu")
            page.keyboard.press("Enter")
            assert page.is_visible("#chats")
            assert page.evaluate(FAULTS) == []
        press_until(page, "Tab" if size != DESKTOP else "Shift+Tab", selector)

    with chatting(running, size, scheme) as (page, _):
        said: list[str] = []
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.accept()))
        if size == DESKTOP:
            view_chats(page)
            page.focus("#question")
            assert page.is_visible("#chats")
        assert page.is_visible("#menu") == (size != DESKTOP)
        converse(page, "first", "one")
        press_until(page, "Shift+Tab", "#new")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "question"
        converse(page, HOSTILE, "two")
        hostile = re.sub(r"\s+", " ", HOSTILE)[:60]
        assert titles(page) == [hostile, "first"]
        assert page.evaluate(FAULTS) == []

        to_list("#list li:nth-child(2) > :first-child")
        page.keyboard.press("Enter")
        assert shown(page) == ["first", "one"]
        assert page.text_content("#said") == "Opened: first"
        assert page.locator("#list [aria-current=true]").all_text_contents() == ["first"]
        focus = "#list [aria-current=true]" if size == DESKTOP else "#menu"  # the drawer is closed
        assert page.evaluate("focus => document.activeElement.matches(focus)", focus)
        assert page.is_visible("#chats") == (size == DESKTOP)
        page.reload()
        assert shown(page) == ["first", "one"]
        converse(page, "more", "three")
        assert titles(page)[0] == "first"  # the last used one

        page.focus("#question")
        to_list("#list li:nth-child(2) > :last-child")
        page.keyboard.press("Enter")  # deletes the other one
        assert said == [f"Delete “{hostile}”?"]
        assert titles(page) == ["first"]
        assert shown(page) == ["first", "one", "more", "three"]
        press_until(page, "Tab", "#list li:nth-child(1) > :last-child")
        page.keyboard.press("Enter")  # deletes the one that is open
        assert said[1:] == ["Delete “first”?"]
        assert shown(page) == []
        assert page.is_visible("#welcome")
        assert page.text_content("#said") == "Deleted: first"
        assert page.evaluate("Object.keys(localStorage).filter(k => k.includes('chat'))") == []
        assert page.evaluate("window.attacked") is None
        background = sum(
            page.evaluate(
                "getComputedStyle(document.getElementById('chats')).backgroundColor"
                ".match(/[0-9]+/g).map(Number)"
            )
        )
        assert background > 600 if scheme == "light" else background < 120


def test_esc_closes_the_drawer_and_then_stops_the_answer(running: Running) -> None:
    with chatting(running) as (page, _):
        holding(page)
        ask(page, "a question")
        page.wait_for_selector("#chat.busy")
        page.click("#menu")
        page.keyboard.press("Escape")
        page.wait_for_selector("#chats", state="hidden")
        assert page.locator("#chat.busy").count() == 1
        page.keyboard.press("Escape")
        ends(page)


def test_a_conversation_that_is_left_or_deleted_while_it_is_answered(running: Running) -> None:
    """The one that is left keeps its question; the deleted one does not come back."""
    with chatting(running) as (page, _):
        view_chats(page)
        chat(page, ("old", "one"))
        page.click("#new")
        holding(page)
        ask(page, "left")
        page.wait_for_selector("#chat.busy")
        page.click("#list >> text=old")
        ends(page)
        assert shown(page) == ["old", "one"]
        page.click("#list >> text=left")
        assert shown(page) == ["left", ""]
        assert page.text_content(".given footer small") == "Stopped."
        page.click(".given footer >> text=Try again")
        page.wait_for_selector("#chat.busy")
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#list [aria-label='Delete “left”']")
        ends(page)
        page.reload()
        assert titles(page) == ["old"]
        assert shown(page) == []


def test_tabs_have_conversations_of_their_own_and_can_share_one(running: Running) -> None:
    """Turns that two tabs add to one conversation at the same time are all kept, in order."""
    with chatting(running) as (first, _):
        second = first.context.new_page()
        for page, name in ((first, "a"), (second, "b")):
            page.goto(running.url)
            view_chats(page)
            chat(page, (name, f"answer {name}"))
        for page, name in ((first, "a"), (second, "b")):
            page.wait_for_function("() => document.querySelectorAll('#list li').length === 2")
            page.reload()
            assert shown(page) == [name, f"answer {name}"]

        second.click("#list >> text=a")
        assert shown(second) == ["a", "answer a"]
        waiting = [holding(first), holding(second)]
        ask(first, "first's")
        first.wait_for_selector("#chat.busy")
        second.wait_for_function("() => document.querySelectorAll('article').length === 4")
        ask(second, "second's")
        second.wait_for_selector("#chat.busy")
        release(second, waiting[1], "two")
        release(first, waiting[0], "one")
        for page in (first, second):
            page.wait_for_function(
                "() => [...document.querySelectorAll('.text')].at(-2).innerText === 'one'"
            )
            turns = [["a", "answer a"], ["first's", "one"], ["second's", "two"]]
            assert page.evaluate(STORED) == turns
            assert shown(page) == [text for turn in turns for text in turn]

        second.on("dialog", lambda dialog: dialog.accept())
        second.click("#list [aria-label='Delete “a”']")
        first.wait_for_function("() => document.querySelectorAll('#list li').length === 1")
        first.unroute(ROUTE)
        converse(first, "last", "three")  # who goes on with a deleted one has all of it
        assert first.evaluate(STORED) == [*turns, ["last", "three"]]


def test_an_answer_is_kept_until_another_one_has_words(slowly: Running) -> None:
    """Over a reload, too."""
    with chatting(slowly) as (page, _):
        converse(page, "a question", "old")
        holding(page)
        page.click(".given footer >> text=Try again")
        page.wait_for_selector("#chat.busy")
        assert shown(page) == ["a question", ""]
        page.reload()
        assert shown(page) == ["a question", "old"]
        page.unroute(ROUTE)
        page.click(".given footer >> text=Try again")
        streams(page)
        page.reload()
        streams(page)
        assert shown(page)[0] == "a question"
        assert "old" not in shown(page)
        assert page.evaluate(STORED)[0][1]


def test_a_full_storage_drops_the_oldest_conversation(running: Running) -> None:
    """And says so; a conversation that fits in no way goes on without being kept, and costs no
    other one."""
    with chatting(running) as (page, _):
        view_chats(page)
        for name in ("oldest", "older", "old"):
            chat(page, (name, name * 1000))
        page.click("#new")
        page.evaluate(FILL)
        converse(page, "a question", "an answer")
        assert titles(page) == ["a question", "old", "older"]
        assert page.text_content("#told").startswith("The browser's storage was full")
        assert page.text_content("#told") in page.text_content("#said")
        converse(page, "another", "one")
        assert not page.is_visible("#told")
        page.reload()
        assert shown(page) == ["a question", "an answer", "another", "one"]

        page.evaluate(FILL)
        converse(page, "large " * 5000, "fits nowhere")
        assert page.text_content("#told").startswith("This browser does not keep what is new here")
        converse(page, "small", "neither")
        assert shown(page)[-4:] == [("large " * 5000).strip(), "fits nowhere", "small", "neither"]
        assert titles(page) == ["a question", "old", "older"]
        page.evaluate("localStorage.removeItem('filler')")
        converse(page, "now", "again")
        assert len(page.evaluate(STORED)) == 5


def test_an_older_pages_conversation_can_still_be_opened(running: Running) -> None:
    kept = {
        "system": "Be brief.",
        "temperature": "0.5",
        "messages": [
            {"role": "user", "content": "before"},
            {"role": "assistant", "content": "one", "thought": "", "note": ""},
            {"role": "user", "content": "after"},
            {"role": "assistant", "content": "two", "thought": "hm", "note": "2 tokens"},
        ],
        "from": 2,
    }
    with chatting(running) as (page, bodies):
        page.evaluate(
            "kept => {localStorage.clear(); localStorage.setItem('smart.chat', kept)}",
            json.dumps(kept),
        )
        page.reload()
        view_chats(page)
        page.click("#list >> text=before")
        assert shown(page)[::2] == ["before", "after"]
        assert page.locator(".given .text").all_inner_texts() == ["one", "two"]
        assert page.text_content(".given:last-of-type footer small") == "2 tokens"
        assert page.evaluate("document.querySelectorAll('#beyond ~ article').length") == 2
        converse(page, "more", "three")
        assert bodies[0]["temperature"] == 0.5
        contents = [message["content"] for message in bodies[0]["messages"]]
        assert contents == ["Be brief.", "after", "two", "more"]
        page.on("dialog", lambda dialog: dialog.accept())
        page.click("#list [aria-label='Delete “before”']")
        page.reload()
        assert titles(page) == []
        assert page.input_value("#system") == "Be brief."
        assert page.input_value("#temperature") == "0.5"
