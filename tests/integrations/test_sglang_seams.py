"""The contract with SGLang: every name that the plugin relies on, in the installed wheel."""

from __future__ import annotations

import ast
import inspect
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_wheel import source_of

from smart_decoding.integrations import sglang as integration
from smart_decoding.integrations.sglang import seams
from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

ALL = [
    (module, name, parameters)
    for part in (seams.REPLACED, seams.WRAPPED, seams.USED)
    for module, names in part.items()
    for name, parameters in names.items()
]


def members(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names that these statements define, or import, at their own level or in a `try` of it."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Try):
            yield from members(node.body)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (
                (target.id, node) for target in node.targets if isinstance(target, ast.Name)
            )


@pytest.mark.parametrize(("module", "name", "parameters"), ALL)
def test_every_name_that_is_relied_on_is_there(
    module: str, name: str, parameters: seams.Parameters
) -> None:
    body = ast.parse(source_of(module).read_text()).body
    *owners, last = name.split(".")
    for owner in owners:
        found = dict(members(body))[owner]
        assert isinstance(found, ast.ClassDef)
        body = found.body
    node = dict(members(body))[last]
    if parameters is not None:
        assert isinstance(node, ast.FunctionDef)
        taken = [
            *node.args.posonlyargs,
            *node.args.args,
            *([node.args.kwarg] if node.args.kwarg else []),
        ]
        taken = [argument.arg for argument in taken if argument.arg not in ("self", "cls")]
        assert tuple(taken[: len(parameters)]) == parameters


def test_the_policy_has_all_that_is_public_in_the_class_it_replaces() -> None:
    names = seams.REPLACED["sglang.srt.speculative.adaptive_spec_params"]
    _, _, kind = integration.TARGET.rpartition(".")
    body = dict(
        members(
            ast.parse(source_of("sglang.srt.speculative.adaptive_spec_params").read_text()).body
        )
    )[kind]
    assert isinstance(body, ast.ClassDef)
    public = {name for name, _ in members(body.body) if not name.startswith("_")}
    assert {f"{kind}.{name}" for name in public} == set(names) - {f"{kind}.__init__"}
    for name, parameters in names.items():
        ours = inspect.getattr_static(SmartSpecPolicy, name.split(".")[1])
        function = ours.fget if isinstance(ours, property) else ours
        assert tuple(inspect.signature(function).parameters)[1:] == parameters
    assert f"{kind}(" in source_of("sglang.srt.speculative.eagle_worker_v2").read_text()


def test_options_are_those_of_its_arguments() -> None:
    pytest.importorskip(
        "msgspec", reason="SGLang's light dependencies are not installed here: make test-sglang"
    )
    source_of("sglang.srt.server_args")
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.server_args import ServerArgs

    arguments = ServerArgs(model_path="none")
    assert [name for name in seams.OPTIONS if not hasattr(arguments, name)] == []
    declare_resolution(arguments, "test", speculative_eagle_topk=2)
    assert ("test", {"speculative_eagle_topk": 2}) in getattr(arguments, seams.RECORD)


def test_the_entry_point_is_the_one_that_sglang_looks_for() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (group,) = [g for g in pyproject["project"]["entry-points"] if g.startswith("sglang")]
    assert pyproject["project"]["entry-points"][group] == {
        "smart": "smart_decoding.integrations.sglang:register"
    }
    assert f'"{group}"' in source_of("sglang.srt.plugins.__init__").read_text()
    assert os.environ.get(integration.COSTS) is None
