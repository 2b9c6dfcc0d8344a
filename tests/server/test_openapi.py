"""schemathesis on the server's own document: whatever a body holds, it is never the server that
fails."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from serving import NAME, Running, serving

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = int(os.environ.get("SMART_EXAMPLES", "40"))  # an operation; `make soak` tries more


@pytest.fixture(scope="module")
def small(load: Any) -> Iterator[Running]:
    """Answers are short here: the context is."""
    with serving(lambda: load(max_model_len=48), max_queue=64) as running:
        yield running


@pytest.fixture(scope="module")
def document(small: Running) -> Any:
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


def try_out(case: Any) -> None:
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = NAME  # any other is a 404
    response = case.call(timeout=20)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(json.loads(response.text)["error"]) == {"message", "type", "param", "code"}


def test_no_request_makes_the_server_fail(document: Any, small: Running) -> None:
    operations = [found.ok() for found in document.get_all_operations()]
    assert {operation.path for operation in operations} == set(document.raw_schema["paths"])
    for operation in operations:
        bounded = settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        bounded(given(operation.as_strategy())(try_out))()
    assert small.idle()
    small.llm.engine.check_integrity()


def test_the_document_tells_of_what_is_served(document: Any) -> None:
    paths = document.raw_schema["paths"]
    assert {
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/health",
        "/health/live",
        "/version",
        "/metrics",
    } <= set(paths)
    schemas = document.raw_schema["components"]["schemas"]
    assert all(schema.get("additionalProperties") is not False for schema in schemas.values())
    fields = schemas["ChatRequest"]["properties"]
    assert {"tools", "tool_choice", "response_format", "structured_outputs", "messages"} <= set(
        fields
    )
