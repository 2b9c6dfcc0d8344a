"""Installs a wheel into empty environments where no compiler is on the path, and decodes with it.

    python tools/check_wheel.py dist/smart_decoding-*.whl

The Python that runs this gets all dependencies and answers with SmolLM2-135M, under speculation and
without. Every other Python from 3.11 on that the machine has gets the wheel alone, and calls one
kernel: one wheel serves them all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DECODE = """
import sys
from smart_decoding import LLM, SamplingParams
from smart_decoding.kernels import library
assert library.LIBRARIES.is_relative_to(sys.prefix), library.LIBRARIES
params = SamplingParams(temperature=0, max_tokens=48)
answers = []
for config in ({"policy": "eagle2"}, False):  # a fixed tree drafts however busy the machine is
    llm = LLM("smollm2-135m", speculative_config=config)
    answers.append(llm.generate(["The sky is blue because"], params)[0].outputs[0])
assert answers[0].token_ids == answers[1].token_ids and len(answers[0].token_ids) > 10
assert answers[0].tokens_per_round > 1, "nothing was drafted"
print(f"decoded {len(answers[0].token_ids)} identical tokens by the variant {library.chosen()}")
"""
CALL = """
import ctypes, sys
from smart_decoding.kernels import library
kernels = library.library()
x, y = (ctypes.c_float * 4)(2, 2, 2, 2), (ctypes.c_float * 4)()
kernels.smart_rms_norm(x, (ctypes.c_float * 4)(1, 2, 3, 4), 0.0, 1, 4, y, 4)
assert [round(value, 4) for value in y] == [1, 2, 3, 4], list(y)
print(f"Python {sys.version.split()[0]}: the variant {library.chosen()} runs")
"""


def other_pythons() -> list[str]:
    """Pythons of 3.11 to 3.14 on the path, each version once, but for the running one."""
    found = {}
    for minor in range(11, 15):
        python = shutil.which(f"python3.{minor}")
        works = (
            python
            and subprocess.run([python, "-c", "import venv"], capture_output=True).returncode == 0
        )
        if works and minor != sys.version_info.minor:
            found[minor] = python
    return list(found.values())


def environment(python: str, folder: Path, arguments: list[str]) -> Path:
    """A new environment with what pip is told to install; returns its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    pip = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
    ]
    subprocess.run([*pip, *arguments], check=True)
    return folder / "bin" / "python"


def run(python: Path, program: str) -> None:
    """Runs it away from the clone, with nothing on the path."""
    bare = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "CXX", "SMART_ISA")
    }
    with tempfile.TemporaryDirectory() as empty:
        command = [str(python), "-c", program]
        subprocess.run(command, check=True, cwd=empty, env={**bare, "PATH": empty})


def main(wheel: str) -> None:
    path = str(Path(wheel).resolve(strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for number, python in enumerate(other_pythons()):
            run(environment(python, Path(folder) / str(number), ["--no-deps", path]), CALL)
        run(environment(sys.executable, Path(folder) / "full", [path]), DECODE)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
