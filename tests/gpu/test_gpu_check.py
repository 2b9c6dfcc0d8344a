"""tools/gpu_check.sh at a tiny size, on what a bare machine has: a copy of the tree, no repository,
no CPU kernels, and of packages torch, Triton and numpy only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is to interpret: make test-gpu-path", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed here: make test-gpu-path")

ROOT = Path(__file__).parents[2]
# Packages that are hidden, and finders of editable installations, which would find another tree.
BARE = """
import sys

HIDDEN = {names!r}

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path[:] = [f for f in sys.meta_path if "redirect" not in type(f).__name__.lower()]
sys.meta_path.insert(0, Hide())
"""
HIDDEN = (
    *("tqdm", "safetensors", "tokenizers", "gguf", "huggingface_hub", "transformers", "scipy"),
    *("matplotlib", "pydantic", "fastapi", "uvicorn", "PIL", "pytest", "httpx"),
)
LAST = re.compile(
    r"GPU_CHECK FAIL plain/floor=[\d.]+ smart/eagle2@1,2=[\d.]+,[\d.]+ "
    r"smart/pooled_chain@1,2=[\d.]+,[\d.]+ knee=(-|\d+) why=(plain,|smart,|knee,)*gpu"
)


def bare_tree(folder: Path) -> Path:
    """The files that travel, in a folder of their own."""
    for part in ("src/smart_decoding", "benchmarks/smart_lab", "tools"):
        shutil.copytree(
            ROOT / part, folder / part, ignore=shutil.ignore_patterns("lib", "__pycache__")
        )
    hiding = folder / "hiding"
    hiding.mkdir()
    (hiding / "sitecustomize.py").write_text(BARE.format(names=HIDDEN))
    return hiding


def test_it_answers_on_a_bare_machine(tmp_path: Path) -> None:
    hiding = bare_tree(tmp_path / "tree")
    path = [str(hiding), *(str(Path(package.__file__).parents[1]) for package in (triton, np))]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    script = tmp_path / "tree/tools/gpu_check.sh"
    done = subprocess.run(
        ["sh", script, "--json", "r.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    found = json.loads((tmp_path / "r.json").read_text())
    failed = {name: step for name, step in found["steps"].items() if step["status"] != "ok"}
    assert not failed, done.stdout
    assert LAST.fullmatch(done.stdout.splitlines()[-1]), done.stdout
    assert done.returncode == 3
    assert found["line"] == done.stdout.splitlines()[-1]
    assert found["hardware"]["cpu_kernels"].startswith("none: ")
    assert found["commit"].endswith("not in a repository")
    assert len(found["parity"]["checks"]) == 10
    assert all(check["ok"] for check in found["parity"]["checks"])
    assert [point["batch_size"] for point in found["decode"]["points"]] == [1, 2]
    assert all(point["counts"]["operations"] > 50 for point in found["decode"]["points"])
    for level in ("replay-eagle3", "replay-msd"):
        runs = found[level]["runs"]
        assert [run["batch_size"] for run in runs] == [1] * 5 + [2] * 5
        assert all(run["identical"] for run in runs)
        assert [run["batch_size"] for run in found[level]["ways"]] == [1, 2]
        assert all(run["identical"] for run in found[level]["ways"])
    assert done.stdout.splitlines()[-2].startswith("DRAFTING winner=")
