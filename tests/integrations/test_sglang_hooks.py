"""The plugin in SGLang's own start-up: its plugin loader, its hooks, its argument resolution (no
engine, no GPU)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang_wheel import source_of

pytest.importorskip(
    "msgspec", reason="SGLang's light dependencies are not installed here: make test-sglang"
)

SECONDS = {
    "1": {"0": 0.010, "2": 0.012, "4": 0.014, "6": 0.018},
    "32": {"0": 0.020, "2": 0.040, "4": 0.08, "6": 0.2},
}
NODES = {"2": 6, "4": 14, "6": 30}
CANDIDATES = {"1": {"candidate_steps": [0, 2, 4, 6]}, "16": {"candidate_steps": [0, 2]}}

# SGLang resolves what it was told in these calls.
START = """
import json, sys
from sglang.srt.plugins import load_plugins

load_plugins()  # finds our entry point, calls it, applies the hooks
from sglang.srt.arg_groups import speculative_hook
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative import adaptive_runtime_state, adaptive_spec_params
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

args = ServerArgs(model_path="none", **json.loads(sys.argv[1]))
view = resolving_view(args)
speculative_hook._maybe_disable_adaptive(args)
if view.speculative_adaptive:
    speculative_hook._init_adaptive_speculative_params(args)
print(json.dumps({
    "policy": adaptive_spec_params.AdaptiveSpeculativeParams.__module__,
    "controller": adaptive_runtime_state.AdaptiveController.__module__,
    "adaptive": view.speculative_adaptive,
    "tokens": view.speculative_num_draft_tokens,
    "widest": SpeculativeAlgorithm.EAGLE3.resolve_max_speculative_num_draft_tokens(args),
}))
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"seconds": SECONDS, "nodes": NODES}))
    (tmp_path / "chains.json").write_text(json.dumps({"seconds": SECONDS}))
    steps = tmp_path / "steps.json"
    steps.write_text(json.dumps(CANDIDATES))
    return {"costs": costs, "chains": tmp_path / "chains.json", "steps": str(steps)}


def start(costs: Path | None, **arguments: Any) -> dict[str, Any]:
    """SGLang's resolution of these arguments in a process of its own."""
    source_of("sglang.srt.plugins.hook_registry")
    environment = {**os.environ}
    environment.pop("SMART_SGLANG_COSTS", None)
    if costs is not None:
        environment["SMART_SGLANG_COSTS"] = str(costs)
    given = {
        "speculative_algorithm": "EAGLE3",
        "speculative_adaptive": True,
        "speculative_num_steps": 4,
        **arguments,
    }
    run = subprocess.run(
        [sys.executable, "-c", START, json.dumps(given)],
        env=environment,
        text=True,
        capture_output=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


OURS = "smart_decoding.integrations.sglang."


def test_trees_are_adaptive_and_buffers_fit_the_widest_tier(files) -> None:
    found = start(
        files["costs"], speculative_eagle_topk=4, speculative_adaptive_config=files["steps"]
    )
    assert found == {
        "policy": f"{OURS}policy",
        "controller": f"{OURS}trees",
        "adaptive": True,
        "tokens": 15,
        "widest": 31,
    }


def test_without_the_file_sglang_refuses_trees_as_ever(files) -> None:
    found = start(None, speculative_eagle_topk=4, speculative_adaptive_config=files["steps"])
    assert not found["adaptive"]
    assert not found["policy"].startswith("smart")
    assert not found["controller"].startswith("s_")


@pytest.mark.parametrize("arguments", [{"page_size": 16}, {"enable_two_batch_overlap": True}])
def test_what_trees_cannot_run_with_is_not_adaptive(files, arguments) -> None:
    found = start(
        files["costs"],
        speculative_eagle_topk=4,
        speculative_adaptive_config=files["steps"],
        **arguments,
    )
    assert not found["adaptive"]


def test_chains_are_sized_as_sglang_sizes_them(files) -> None:
    found = start(
        files["chains"], speculative_eagle_topk=1, speculative_adaptive_config=files["steps"]
    )
    assert found["policy"] == f"{OURS}policy"
    assert found["controller"] == "sglang.srt.speculative.adaptive_runtime_state"
    assert found["adaptive"]
    assert found["tokens"] == 5
    assert found["widest"] == 7


EXAMPLES = Path(__file__).parents[2] / "docs" / "sglang"


@pytest.mark.parametrize(
    ("kind", "topk", "tokens", "widest"), [("chain", 1, 4, 6), ("tree", 4, 15, 31)]
)
def test_the_documented_examples_start(kind, topk, tokens, widest) -> None:
    """With the options of docs/sglang.md."""
    found = start(
        EXAMPLES / f"{kind}-costs.json",
        speculative_eagle_topk=topk,
        speculative_num_steps=3 if kind == "chain" else 4,
        speculative_num_draft_tokens=tokens,
        speculative_adaptive_config=str(EXAMPLES / f"{kind}-steps.json"),
    )
    assert found["policy"] == f"{OURS}policy"
    assert found["adaptive"]
    assert (found["tokens"], found["widest"]) == (tokens, widest)
