import sys
from pathlib import Path

import pytest

from smart_decoding.core.policies import POLICIES
from smart_lab.rival_policies import RIVAL_POLICIES

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "bench"))  # for worlds.py
sys.path.insert(0, str(Path(__file__).parent))  # for measured.py


@pytest.fixture(autouse=True)
def rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the laboratory's policies, as its commands do, for a test only."""
    for name, policy in RIVAL_POLICIES.items():
        monkeypatch.setitem(POLICIES, name, policy)
