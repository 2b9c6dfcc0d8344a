"""What doubling and halving each of the controller's own constants does: next to nothing. They are
orders of magnitude, not settings of one machine."""

import importlib

import pytest

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy
from smart_lab.simulation import World, run

CORE = "smart_decoding.core"
CONSTANTS = [
    (f"{CORE}.exploration", "RUN"),
    (f"{CORE}.exploration", "PAUSE"),
    (f"{CORE}.learned", "COSTS_EVERY"),
    (f"{CORE}.learned", "ACCEPTANCE_EVERY"),
    (f"{CORE}.learned", "SURPRISE"),
    (f"{CORE}.learned", "UNSURE"),
    (f"{CORE}.overhead", "SLOW"),
    (f"{CORE}.policies.smart", "REST"),
    (f"{CORE}.prediction", "STAY"),
    (f"{CORE}.prediction", "NODES"),
    (f"{CORE}.running", "GAIN"),
]
ROWS = {4: 23.1, 8: 27.2, 16: 33.7, 32: 51.4, 64: 87.8, 128: 149.0, 256: 267.0}
COSTS = CostModel.from_table({4: ROWS}, {1: 1.2, 4: 1.4, 16: 2.3, 64: 5.0, 128: 9.0})
ROUNDS = range(250)


def rate() -> float:
    """Of a drafter that is bad for a while, at batch 4."""
    world = World(3, 4, COSTS, good=lambda index: not 80 <= index < 160, overhead=0.3)
    return run(make_policy("smart", cost=COSTS), world, ROUNDS).rate


@pytest.mark.parametrize(("module", "name"), CONSTANTS, ids=lambda part: part.rpartition(".")[2])
def test_half_and_twice_as_much(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = rate()
    home = importlib.import_module(module)
    value = getattr(home, name)
    for factor in (0.5, 2):
        monkeypatch.setattr(home, name, type(value)(value * factor))
        assert rate() == pytest.approx(usual, rel=0.03), factor
