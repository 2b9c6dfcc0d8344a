"""Virtual environments for peers, made once under the cache folder: nothing of theirs enters our
own environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from smart_decoding.errors import DownloadError
from smart_decoding.models.hub import cache_dir
from smart_lab.peers.catalogue import Environment, python_in

MADE = "made.json"  # written last: what is in a finished environment
Call = Callable[[Sequence[str], Mapping[str, str], Path], int]


def python_for(environment: Environment, call: Call | None = None) -> Path:
    """The environment's Python; it is made first if it is not there, or holds something else.

    Raises DownloadError, naming the log, if pip cannot install what is needed."""
    folder = cache_dir() / "peers" / environment.name
    wanted = {"requirements": requirements(environment), "removed": list(environment.remove)}
    if _made(folder) != wanted:
        _make(folder, environment, wanted["requirements"], call or _call)
        (folder / MADE).write_text(json.dumps(wanted))
    return python_in(folder)


def requirements(environment: Environment) -> list[str]:
    """With our own version of torch where one is asked for, so that both run the same."""
    version = metadata.version("torch").partition("+")[0]
    return [text.format(torch=version) for text in environment.requirements]


def _made(folder: Path) -> object:
    try:
        return json.loads((folder / MADE).read_text())
    except (OSError, ValueError):
        return None


def _make(folder: Path, environment: Environment, wanted: Sequence[str], call: Call) -> None:
    print(
        f"smart: making the environment of {environment.name} in {folder} (minutes)",
        file=sys.stderr,
        flush=True,
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except (OSError, subprocess.CalledProcessError) as error:
        raise DownloadError(f"no virtual environment could be made in {folder}: {error}") from error
    pip = [str(python_in(folder)), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    steps = [[*pip, "install", *wanted]]
    steps += [[*pip, "uninstall", "--yes", *environment.remove]] if environment.remove else []
    for step in steps:
        if call(step, environment.variables, log) != 0:
            raise DownloadError(
                f"pip could not {step[5]} {' '.join(step[6:])}: {_reason(log)} (see {log})"
            )


def _call(command: Sequence[str], variables: Mapping[str, str], log: Path) -> int:
    """Runs pip, niced where that is known: a compilation should not stall the machine."""
    nice = shutil.which("nice")
    with log.open("ab") as output:
        return subprocess.call(
            [*([nice, "-n", "15"] if nice else []), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables},
        )


def _reason(log: Path) -> str:
    try:
        lines = [
            line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith("ERROR")] or lines or ["it said nothing"]
    return told[-1].removeprefix("ERROR: ")[:200]
