"""Installs a wheel into empty environments where no compiler is on the path, and decodes with it.

    python tools/check_wheel.py dist/smart_decoding-*.whl

Of several wheels the one for this machine is taken. A wheel for aarch64 has its kernels called
under qemu, where that and the compiler are installed.

The Python that runs this gets all dependencies and answers with SmolLM2-135M, under speculation and
without. `pip install` and then `smart run` come to their first word within FIRST_WORD seconds.
Counted are: a new environment, the install of the wheel and of all dependencies, torch among them,
and the first `smart run`, which compiles nothing, converts the model's file and starts cold. Not
counted are downloads: of packages, which pip fetches before, and of the model's file. Every other
Python of 3.11 to 3.14 that the machine has gets the wheel alone, and calls one kernel: one wheel
serves them all. Those that were not found are named, and those for which there is no torch.

Needed by `make test-wheel`.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

FIRST_WORD = 60.0  # seconds, asked of a machine that does nothing else
BUSY = 3.0  # times as many, where it does
MINORS = range(11, 15)
ARM_COMPILER = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
QUESTION = "Why is the sky blue?"
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


CALL_ARM = """
#include <dlfcn.h>
#include <cmath>
#include <cstdio>
using RmsNorm = void (*)(const float *, const float *, float, int, long, float *, long);
int main(int, char **arguments) {
    dlopen("libgomp.so.1", RTLD_NOW | RTLD_GLOBAL);
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) return std::puts(dlerror());
    auto norm = reinterpret_cast<RmsNorm>(dlsym(library, "smart_rms_norm"));
    float x[] = {2, 2, 2, 2}, weight[] = {1, 2, 3, 4}, y[4] = {};
    norm(x, weight, 0.0f, 1, 4, y, 4);
    for (int i = 0; i < 4; i++)
        if (std::fabs(y[i] - weight[i]) > 1e-4f) return 1;
}
"""


def other_pythons() -> dict[int, str | None]:
    """The Python of each minor version of 3.11 to 3.14 that makes environments, but for the running
    one; None where there is none. On the path, else pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for minor in MINORS:
        if minor != sys.version_info.minor:
            name = f"python3.{minor}"
            on_path = (Path(folder) / name for folder in os.get_exec_path())
            candidates = [*on_path, *sorted(pyenv.glob(f"3.{minor}.*/bin/{name}"))]
            found[minor] = next((str(each) for each in candidates if _works(each)), None)
    return found


def _works(python: Path) -> bool:
    """Whether it is a Python, and no shim without one, that has what environments need."""
    if not os.access(python, os.X_OK):
        return False
    command = [str(python), "-c", "import venv, ensurepip"]
    return subprocess.run(command, capture_output=True).returncode == 0


def has_torch(python: Path) -> bool:
    """Whether the package index has a torch for it."""
    command = [str(python), "-m", "pip", "index", "versions", "torch"]
    return subprocess.run(command, capture_output=True).returncode == 0


def environment(python: str, folder: Path, arguments: list[str]) -> Path:
    """A new environment with what pip is told to install; returns its Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    made = folder / "bin" / "python"
    pip(str(made), "install", *arguments)
    return made


def pip(python: str, *arguments: str) -> None:
    """Runs pip, quietly."""
    quiet = ["--disable-pip-version-check", "-q"]
    subprocess.run([python, "-m", "pip", *arguments, *quiet], check=True)


def bare(empty: str, **more: str) -> dict[str, str]:
    """An environment with nothing on the path, and nothing of this one that chooses code."""
    left_out = ("PYTHONPATH", "CXX", "SMART_ISA")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PATH": empty, **more}


def run(python: Path, program: str) -> None:
    """Runs it away from the clone."""
    with tempfile.TemporaryDirectory() as empty:
        command = [str(python), "-c", program]
        subprocess.run(command, check=True, cwd=empty, env=bare(empty))


def answer(python: Path, cache: str, *options: str) -> tuple[float, str]:
    """Seconds until the first word of `smart run`, and all that it says."""
    with tempfile.TemporaryDirectory() as empty:
        command = [str(python.with_name("smart")), "run", *options, QUESTION]
        started = time.monotonic()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=empty, env=bare(empty, SMART_CACHE=cache)
        ) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.monotonic() - started
            said = first + process.stdout.read()
        if process.returncode:
            sys.exit(f"smart run has failed with status {process.returncode}")
    return seconds, said.decode()


def model_files(cache: str) -> None:
    """Puts the default model's file into a cache, and nothing that was made of it."""
    from smart_decoding.models.checkpoints.hub import cache_dir
    from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL, resolve

    resolve(DEFAULT_MODEL)  # fetches it if need be
    for entry in cache_dir().iterdir():
        if entry.name not in ("converted", "profiles"):
            (Path(cache) / entry.name).symlink_to(entry)


def check_first_word(path: str, folder: Path) -> Path:
    """Installs the wheel from packages that are downloaded before, and asks; returns the Python.

    Ends the check if the first word comes late, or speculation changes the answer."""
    packages = str(folder / "packages")
    pip(sys.executable, "download", "-d", packages, path)
    started = time.monotonic()
    given = ["--no-index", "--find-links", packages, path]
    python = environment(sys.executable, folder / "full", given)
    installed = time.monotonic() - started
    with tempfile.TemporaryDirectory() as cache:
        model_files(cache)
        seconds, said = answer(python, cache)
        _, plain = answer(python, cache, "--policy", "off")
    total = installed + seconds
    print(f"{total:.1f} s to the first word, downloads not counted: ", end="")
    print(f"pip install {installed:.1f} s, smart run {seconds:.1f} s")
    print(f"asked is {FIRST_WORD:.0f} s, where nothing else runs")
    if total > BUSY * FIRST_WORD:
        sys.exit(f"pip install and the first word may take {BUSY * FIRST_WORD:.0f} s together")
    if said != plain or len(said) < 20:
        sys.exit(f"plain decoding says something else: {said!r}, {plain!r}")
    return python


def check_others(path: str, folder: Path) -> None:
    """Installs the wheel for all other Pythons, and calls a kernel."""
    for minor, python in other_pythons().items():
        if python is None:
            print(f"Python 3.{minor}: not found here, not tried")
            continue
        made = environment(python, folder / str(minor), ["--no-deps", path])
        run(made, CALL)
        if not has_torch(made):
            print(f"Python 3.{minor}: the index has no torch for it, so SMART cannot run there yet")


def check_aarch64(path: str, folder: Path) -> None:
    """Calls a kernel of each variant in a wheel for aarch64, under qemu."""
    if not all(map(shutil.which, (ARM_COMPILER, QEMU))):
        print(f"aarch64: not run, as {ARM_COMPILER} or {QEMU} is missing")
        return
    source = folder / "call.cpp"
    source.write_text(CALL_ARM)
    program = folder / "call"
    subprocess.run([ARM_COMPILER, "-o", program, source, "-ldl"], check=True)
    with zipfile.ZipFile(path) as wheel:
        libraries = [name for name in wheel.namelist() if name.endswith(".so")]
        wheel.extractall(folder / "arm", libraries)
    assert len(libraries) == 2, libraries
    for name in libraries:
        command = [QEMU, "-L", "/usr/aarch64-linux-gnu", program, folder / "arm" / name]
        subprocess.run(command, check=True)
        print(f"aarch64: {Path(name).stem} runs under qemu")


def main(*wheels: str) -> None:
    paths = [str(Path(wheel).resolve(strict=True)) for wheel in wheels]
    own = [path for path in paths if path.endswith(f"_{platform.machine()}.whl")]
    if len(own) != 1:
        sys.exit(f"of {', '.join(wheels)} {len(own)} are for {platform.machine()}: give one")
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            if path.endswith("_aarch64.whl") and path not in own:
                check_aarch64(path, Path(folder))
        check_others(own[0], Path(folder))
        run(check_first_word(own[0], Path(folder)), DECODE)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
