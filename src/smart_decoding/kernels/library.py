"""Loads the compiled kernels: of all variants that were built, the best one that this CPU and
system can run."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import threading
from dataclasses import dataclass
from pathlib import Path

from smart_decoding.errors import ConfigError
from smart_decoding.kernels import abi, limits

log = logging.getLogger("smart.kernels")

SOURCES = Path(__file__).parent / "csrc"
LIBRARIES = Path(__file__).parent / "lib"
MOST_THREADS = 16  # that are started for each CPU; with thousands nothing ends
BUILD = "build them with `make env` in a clone, or `pip install .` (needs g++ 11 or newer)"


class DeniedError(ConfigError):
    """The system does not let this process use what the CPU has: the next best variant runs."""


@dataclass(frozen=True)
class Variant:
    """The kernels compiled for one kind of CPU. flags: the compiler's; needs: names in
    /proc/cpuinfo."""

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    @property
    def path(self) -> Path:
        """The compiled library."""
        return LIBRARIES / f"libsmart_{self.name}.so"

    @property
    def lacking(self) -> list[str]:
        """What it needs and this CPU has not."""
        return sorted(self.needs - cpu_flags())

    def refusal(self) -> str | None:
        """Return why it cannot run here, as far as can be told without loading it; None if it
        can."""
        if self.machine != platform.machine():
            return f"is for {self.machine}, this is {platform.machine()}"
        if self.lacking:
            return f"needs {', '.join(self.lacking)}, which this CPU lacks"
        return None if self.path.exists() else f"is not built ({self.path} is missing)"


def cpu_info() -> dict[str, str]:
    """Return the first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return what the CPU can do and the system lets it, in the words of /proc/cpuinfo; empty where
    there is none."""
    info = cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Return all of them, the best one of a machine first (csrc/variants.txt)."""
    lines = (SOURCES / "variants.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            name, machine, flags, needs = (part.strip() for part in line.split("|"))
            found.append(Variant(name, machine, tuple(flags.split()), frozenset(needs.split())))
    return tuple(reversed(found))


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library of a variant, ready to be called. Raises ConfigError if it cannot run
    here."""
    variant = next((v for v in variants() if v.name == name), None)
    reason = "is no variant" if variant is None else variant.refusal()
    if variant is None or reason is not None:
        raise ConfigError(
            f"the kernels' variant {name!r} {reason}; here run: {', '.join(runnable()) or 'none'}"
        )
    _check_age(variant)
    _load_openmp()
    if importlib.util.find_spec("torch"):  # who has none counts threads himself
        set_threads()
    try:
        library = ctypes.CDLL(str(variant.path))
    except OSError as error:
        raise ConfigError(
            f"the kernels' variant {name!r} cannot be loaded: {error}; {BUILD}"
        ) from error
    abi.declare(library)
    if library.smart_enable():
        raise DeniedError(f"the system does not let this process use the kernels' variant {name!r}")
    return library


def runnable() -> list[str]:
    """Return the variants that this CPU can run, best first. The system may still refuse one (AMX)
    when it is loaded."""
    return [variant.name for variant in variants() if variant.refusal() is None]


@functools.cache
def chosen() -> str:
    """Return the variant that runs: SMART_ISA, or the best one. Raises ConfigError if SMART_ISA
    cannot run, or none can."""
    wanted = os.environ.get("SMART_ISA")
    if wanted:
        load(wanted)
        return wanted
    refusals = []
    for name in runnable():
        try:
            load(name)
        except DeniedError as error:
            refusals.append(str(error))
        else:
            return name
    raise ConfigError("; ".join(refusals) or _nothing())


def library() -> ctypes.CDLL:
    """Return the kernels that run. Raises ConfigError if there are none."""
    return load(chosen())


@functools.cache
def unavailable() -> str | None:
    """Return why no kernels can run here, or None. Raises ConfigError if SMART_ISA names some that
    cannot."""
    try:
        chosen()
    except ConfigError as error:
        if os.environ.get("SMART_ISA"):
            raise
        return str(error)
    return None


@functools.cache
def identity() -> str:
    """Tell these kernels from all others: what was measured with others does not hold for them."""
    variant = next(v for v in variants() if v.name == chosen())
    return f"{variant.name} {hashlib.sha256(variant.path.read_bytes()).hexdigest()}"


def set_threads() -> None:
    """As many threads as SMART_NUM_THREADS says; without it, no more than the CPUs that its
    control groups grant. Raises ConfigError for what is no number above 0."""
    import torch  # late: it is slow

    wanted = os.environ.get("SMART_NUM_THREADS")
    if wanted:
        if not wanted.isdecimal() or int(wanted) < 1:
            raise ConfigError(
                f"SMART_NUM_THREADS={wanted!r} is not allowed: it must be a number above 0"
            )
        _check_threads(int(wanted), torch.get_num_threads())
        torch.set_num_threads(int(wanted))
    elif "OMP_NUM_THREADS" not in os.environ:
        granted = limits.granted_cpus()
        if granted is not None and granted < torch.get_num_threads():
            torch.set_num_threads(granted)


def _check_threads(wanted: int, before: int) -> None:
    """A warning for more threads than there are CPUs, unless they are so many already. Raises
    ConfigError for so many that no answer would end."""
    cpus = limits.usable_cpus()
    cpus = min(cpus, limits.granted_cpus() or cpus)
    if wanted > MOST_THREADS * cpus:
        raise ConfigError(f"{wanted} threads are not allowed: this process may use {cpus} CPUs")
    if wanted > cpus and wanted != before:
        log.warning("%d threads for %d CPUs wait for each other: fewer are faster", wanted, cpus)


@functools.cache
def _load_openmp() -> None:
    """Make an OpenMP runtime known to the kernels: torch's, since two in a process are two teams of
    threads that spin against each other; the system's where torch has none of its own. Raises
    ConfigError where there is none."""
    torch = importlib.util.find_spec("torch")
    folders = [
        Path(folder) / "lib" for folder in (torch.submodule_search_locations or [] if torch else [])
    ]
    folders += [folder.parents[1] / "torch.libs" for folder in folders]
    mine = [str(path) for folder in folders for path in sorted(folder.glob("libgomp*.so*"))]
    try:
        openmp = ctypes.CDLL((mine or ["libgomp.so.1"])[0], ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ConfigError(
            f"the CPU kernels need OpenMP (Debian: apt-get install libgomp1): {error}"
        ) from error
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        _make_waiting_short(openmp)


def _make_waiting_short(openmp: ctypes.CDLL) -> None:
    """For a process that imported torch first: its OpenMP has already read how long threads spin.
    But where it has more threads than there are CPUs, they sleep after 100 rounds. So a team
    of that many is made once, which sleeps for good. It is left out where threads are short: OpenMP
    ends the process where it cannot start one."""
    nothing = ctypes.CDLL(None).getpid
    parallel = getattr(openmp, "GOMP_parallel", None)
    team = limits.usable_cpus() + 1
    if parallel is None or not limits.may_start(team):
        return

    def hold() -> None:
        parallel(nothing, None, team, 0)
        made.set()
        threading.Event().wait()

    made = threading.Event()
    threading.Thread(target=hold, name="smart-openmp", daemon=True).start()
    made.wait()


def _nothing() -> str:
    mine = [variant for variant in reversed(variants()) if variant.machine == platform.machine()]
    if not mine:
        return f"there are no CPU kernels for {platform.machine()}"
    if mine[0].lacking:
        return f"this CPU lacks {', '.join(mine[0].lacking)}, which the CPU kernels need"
    return f"the CPU kernels are not built: {BUILD}"


def _check_age(variant: Variant) -> None:
    """In a clone, kernels that are older than their sources are an error: what was edited must be
    what runs."""
    if not (SOURCES.parents[3] / "CMakeLists.txt").exists():
        return
    newest = max(source.stat().st_mtime for source in SOURCES.iterdir())
    if variant.path.stat().st_mtime < newest:
        raise ConfigError(f"the CPU kernels are older than their sources: {BUILD}")
