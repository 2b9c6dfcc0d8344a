"""Parts of the installed SGLang wheel, which as a whole imports on GPUs only."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest


def source_of(name: str) -> Path:
    """The file of one of SGLang's modules."""
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        pytest.skip("SGLang is not installed here: make test-sglang")
    return Path(found.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")


def definitions(module: str, names: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Functions of one module, compiled from its own file alone; `given` are the globals that they
    use."""
    path = source_of(module)
    tree = ast.parse(path.read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert [node.name for node in nodes] == names, f"{module} has not all of {names}"
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    space = dict(given)
    code = ast.fix_missing_locations(ast.Module([future, *nodes], []))
    exec(compile(code, str(path), "exec"), space)
    return space
