"""On macOS and Windows the Python part imports, and what lacks is told in one line.

The platforms are faked, in a process of its own: Python's name of the system and of the machine,
modules and functions that it has not, files of Linux' kernel, and no compiled library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import smart_decoding

# Imported before, as what they do on other systems is theirs.
OTHERS = (
    "torch numpy safetensors.torch tokenizers huggingface_hub gguf jinja2.sandbox tqdm asyncio "
    "concurrent.futures.process multiprocessing tempfile subprocess shutil fastapi uvicorn "
    "prometheus_client llguidance PIL.Image matplotlib scipy.optimize httpx "
    "transformers.modeling_utils transformers.generation"
)
FAKE = f"""
import builtins, contextlib, importlib, io, os, platform, signal, sys

for name in {OTHERS!r}.split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
name, machine = sys.argv[1:3]
unix = ["fcntl", "grp", "pwd", "readline", "resource", "termios", "tty"]
missing = {{
    "darwin": (["sched_getaffinity", "memfd_create", "posix_fadvise"], ["SIGSTKFLT"], []),
    "win32": (
        ["sched_getaffinity", "memfd_create", "posix_fadvise", "fork", "getuid", "geteuid", "nice",
         "killpg", "sysconf", "setsid", "getpgid", "getloadavg", "uname", "mkfifo", "fchmod"],
        ["SIGHUP", "SIGKILL", "SIGPROF", "SIGQUIT", "SIGUSR1", "SIGALRM", "SIGPIPE", "setitimer",
         "ITIMER_PROF", "alarm", "pthread_sigmask", "sigwait"],
        unix,
    ),
}}
functions, signals, modules = missing[name]
for each in functions:
    if hasattr(os, each):
        delattr(os, each)
for each in signals:
    if hasattr(signal, each):
        delattr(signal, each)
for each in modules:
    sys.modules[each] = None
sys.platform = name
platform.system = lambda: {{"darwin": "Darwin", "win32": "Windows"}}[name]
platform.machine = lambda: machine
platform.release = lambda: "1"
platform.processor = lambda: ""
opened = io.open

def open_(file, *given, **named):
    if str(file).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return opened(file, *given, **named)

io.open = builtins.open = open_
assert not any(each.startswith("smart_decoding") for each in sys.modules)
"""
TRY = """
import json, pkgutil
import smart_decoding
from smart_decoding.cli.main import main

GUESTS = {"triton", "vllm", "sglang"}
found = {"imported": 0}
for module in pkgutil.walk_packages(smart_decoding.__path__, "smart_decoding."):
    try:
        importlib.import_module(module.name)
        found["imported"] += 1
    except ImportError as error:
        if str(error.name).partition(".")[0] not in GUESTS:
            raise
for line in ("run hi", "models", "info", "serve", "tune llama.cpp -m m.gguf"):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line.split())
    found[line] = (code, out.getvalue(), err.getvalue())
print(json.dumps(found))
"""
DARWIN = "there are no CPU kernels for macOS: use Linux, in a container"
WINDOWS = "there are no CPU kernels for Windows: use Linux, by WSL (wsl --install)"
SYSTEMS = [("darwin", "arm64"), ("win32", "AMD64")]


@pytest.fixture(scope="module", params=SYSTEMS, ids="-".join)
def tried(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a system, how many modules were imported there, and what commands did."""
    system, machine = request.param
    source = Path(smart_decoding.__file__).parents[1]
    script = f"import sys; sys.path.insert(0, {str(source)!r})\n{FAKE}{TRY}"
    env = {**os.environ, "SMART_CACHE": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-c", script, system, machine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stderr
    return system, json.loads(done.stdout)


def test_all_modules_import(tried: Any) -> None:
    _, found = tried
    assert found["imported"] > 200


def test_a_model_is_refused_in_one_line(tried: Any) -> None:
    system, found = tried
    code, out, err = found["run hi"]
    reason = WINDOWS if system == "win32" else DARWIN
    assert err.startswith(f"smart: error: {reason}")
    assert "--allow-slow" in err
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_what_needs_no_kernels_works(tried: Any) -> None:
    _, found = tried
    code, out, _ = found["models"]
    assert code == 0
    assert "smollm2-135m (default)" in out
    code, out, _ = found["info"]
    assert code == 0
    assert "CPU kernels: none (there are no CPU kernels for " in out


@pytest.mark.parametrize("line", ["serve", "tune llama.cpp -m m.gguf"])
def test_commands_that_start_processes_are_not_for_windows(line: str, tried: Any) -> None:
    system, found = tried
    code, _, err = found[line]
    expected = f"smart {line.split()[0]} does not run on Windows: use Linux, by WSL"
    assert code == 2  # on macOS for a lack of kernels, and of a llama-server
    assert err.startswith(f"smart: error: {expected}") == (system == "win32")
    assert system == "darwin" or err.count("\n") == 1
