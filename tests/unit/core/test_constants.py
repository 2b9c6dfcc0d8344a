"""The controller's own constants: few, and orders of magnitude, not settings of one machine."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest
from simulation import World, run

import smart_decoding.core
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import make_policy

CORE = "smart_decoding.core"
CONSTANTS = [
    (f"{CORE}.exploration", "RUN"),
    (f"{CORE}.policies.smart.learn", "COSTS_EVERY"),
    (f"{CORE}.costs", "SURPRISE"),
    (f"{CORE}.exploration", "START"),
    (f"{CORE}.exploration", "MOST"),
    (f"{CORE}.calibration", "NODES"),
    (f"{CORE}.calibration", "HORIZON"),
]
ROWS = {4: 23.1, 8: 27.2, 16: 33.7, 32: 51.4, 64: 87.8, 128: 149.0, 256: 267.0}
COSTS = CostModel.from_table({4: ROWS}, {1: 1.2, 4: 1.4, 16: 2.3, 64: 5.0, 128: 9.0})
ROUNDS = range(250)
MOST = 38  # numbers that the controller may be made of
# Rivals have their published settings; `lengths` decides in other engines.
OTHERS = {"chain", "eagle2", "lengths", "paper", "static"}
PLAIN = {0, 1, 2, 0.5}  # mean in a formula what they mean anywhere


def rate() -> float:
    """Of a drafter that is bad for a while, at batch 4: the mean over a few worlds, as explorations
    come by chance."""
    worlds = [
        World(seed, 4, COSTS, good=lambda index: not 80 <= index < 160, overhead=0.3)
        for seed in range(3, 9)
    ]
    return sum(run(make_policy("smart", cost=COSTS), world, ROUNDS).rate for world in worlds) / len(
        worlds
    )


@pytest.fixture(scope="module")
def usual() -> float:
    return rate()


@pytest.mark.slow
@pytest.mark.parametrize(("home", "name"), CONSTANTS, ids=lambda part: part.rpartition(".")[2])
def test_half_and_twice_as_much(
    home: str, name: str, usual: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = getattr(importlib.import_module(home), name)
    users = [module for key, module in sys.modules.items() if key.startswith(CORE)]
    for factor in (0.5, 2):
        for module in users:
            if name in vars(module):
                monkeypatch.setattr(module, name, type(value)(value * factor))
        assert rate() == pytest.approx(usual, rel=0.03), factor


def numbers(path: Path) -> list[str]:
    """Line and value of each number in a file that is no index, axis, option's bound or count of
    digits."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    named: set[ast.AST] = set()  # values of constants, and defaults of options
    for node in ast.walk(tree):
        inner: list[ast.AST] = []
        if isinstance(node, ast.Subscript):
            inner = [node.slice]
        elif isinstance(node, ast.keyword) and node.arg == "axis":
            inner = [node.value]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            inner = (
                list(node.args) if called in ("require_int", "require_number", "np.round") else []
            )
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper():
            named.add(node.value)
        elif isinstance(node, ast.arguments) and path.parent.stem == "smart":
            named.update(default for default in node.defaults)
        skipped.update(below for each in inner for below in ast.walk(each))
    return [
        f"{path.name}:{node.lineno}: {node.value}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and (abs(node.value) not in PLAIN or node in named)
        and node not in skipped
    ]


def test_the_controller_has_few_numbers() -> None:
    """Named or not, defaults of options included."""
    files = Path(smart_decoding.core.__file__).parent.rglob("*.py")
    found = [each for path in files if path.stem not in OTHERS for each in numbers(path)]
    print("\n".join(found))
    assert len(found) <= MOST
