"""Bodies are JSON by their type: a web page may send other types to any address, unasked."""

from __future__ import annotations

import http.client
import json

import pytest
from serving import NAME, Running

BODY = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1}).encode()


def status(running: Running, content_type: str | None, path: str) -> tuple[int, dict[str, object]]:
    host, _, port = running.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    headers = {} if content_type is None else {"Content-Type": content_type}
    connection.request("POST", path, BODY, headers)
    answer = connection.getresponse()
    found = json.loads(answer.read())
    connection.close()
    return answer.status, found


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",  # curl's -d without a header
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "text/plain; application/json",
    ],
)
def test_what_is_not_said_to_be_json_is_refused(
    running: Running, content_type: str | None, path: str
) -> None:
    code, found = status(running, content_type, path)
    assert code == 415
    assert found["error"]["code"] == "unsupported_media_type"  # type: ignore[index]
    assert "Content-Type: application/json" in str(found)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        "application/json;",
    ],
)
def test_json_is_taken_in_any_spelling(running: Running, content_type: str) -> None:
    assert status(running, content_type, "/v1/completions")[0] == 200
