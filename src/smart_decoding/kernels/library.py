"""Loads the compiled kernels: the best variant that is built and that this machine can run."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from smart_decoding.errors import ConfigError
from smart_decoding.kernels import abi, limits

log = logging.getLogger("smart.kernels")

SOURCES = Path(__file__).parent / "csrc"
LIBRARIES = Path(__file__).parent / "lib"
MOST_THREADS = 16  # threads per CPU, at most; with thousands no answer would end
INSTEAD = {  # of systems that the kernels are not made for
    "win32": "Windows: use Linux, by WSL (wsl --install)",
    "darwin": "macOS: use Linux, in a container (Docker; a clone has a Dockerfile)",
}
BUILD = "build them with `make install` in a clone, or `pip install .` (needs g++ 11 or newer)"


class DeniedError(ConfigError):
    """The system denies this process a feature of the CPU: the next best variant runs."""


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
        """CPU features that it needs and this CPU lacks."""
        return sorted(self.needs - cpu_flags())

    @property
    def has_tiles(self) -> bool:
        """Whether it multiplies by the tiles of AMX."""
        return "amx_tile" in self.needs

    def refusal(self) -> str | None:
        """Return why it cannot run here, as far as is known before loading it; None if it can."""
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
    """Return the CPU features of /proc/cpuinfo, in its names; empty where there is none."""
    info = cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Return all variants of csrc/variants.txt, the best one of a machine first."""
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
    if importlib.util.find_spec("torch"):  # a caller without torch passes its own count
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


class _Running:
    """The variant of this process. measured: the one that was found fastest; None: the best one.
    final: weights may lie in its panels."""

    measured: str | None = None
    final = False


_running = _Running()
_lock = threading.Lock()
_tried: ContextVar[str | None] = ContextVar("tried", default=None)  # of one thread


def chosen() -> str:
    """Return the variant that runs: SMART_ISA, the one that was found fastest, or the best one.
    Raises ConfigError if SMART_ISA cannot run, or none can."""
    return _tried.get() or _running.measured or best()


def library() -> ctypes.CDLL:
    """Return the library of the variant that runs, which no longer changes then. Raises ConfigError
    if none can."""
    if not _running.final and _tried.get() is None:
        with _lock:
            _running.final = True
    return load(chosen())


@contextmanager
def trying(name: str) -> Iterator[None]:
    """Run another variant in the block, in this thread only."""
    token = _tried.set(name)
    try:
        yield
    finally:
        _tried.reset(token)


def candidates() -> list[str]:
    """Return the variants that may be the fastest, the best one first: vectors may be faster than
    the tiles of AMX. One that SMART_ISA names, or that is in use, is the only one."""
    first = chosen()
    if _running.final or os.environ.get("SMART_ISA"):
        return [first]
    by_vectors = (each.name for each in variants() if not each.has_tiles and not each.refusal())
    return list(dict.fromkeys((first, *itertools.islice(by_vectors, 1))))


def settle(name: str) -> None:
    """Run a candidate from now on, unless another one is in use by now."""
    with _lock:
        if not _running.final:
            _running.measured = name
        _running.final = True


@functools.cache
def best() -> str:
    """Return SMART_ISA, or the best variant that this CPU and the system allow. Raises ConfigError
    if SMART_ISA cannot run, or none can."""
    required = os.environ.get("SMART_ISA")
    if required:
        load(required)
        return required
    refusals = []
    for name in runnable():
        try:
            load(name)
        except DeniedError as error:
            refusals.append(str(error))
        else:
            return name
    raise ConfigError("; ".join(refusals) or _nothing())


@functools.cache
def unavailable() -> str | None:
    """Return why no kernels can run here, or None. Raises ConfigError if SMART_ISA names a variant
    that cannot."""
    try:
        best()
    except ConfigError as error:
        if os.environ.get("SMART_ISA"):
            raise
        return str(error)
    return None


@functools.cache
def identity(name: str) -> str:
    """Return a name that only this build of a variant has: times of other kernels do not hold for
    it."""
    variant = next(v for v in variants() if v.name == name)
    return f"{variant.name} {hashlib.sha256(variant.path.read_bytes()).hexdigest()}"


def set_threads() -> None:
    """Set torch's threads to SMART_NUM_THREADS; without it, to no more than the CPUs that control
    groups grant. Raises ConfigError unless it is a number above 0."""
    import torch  # late: it is slow

    count = os.environ.get("SMART_NUM_THREADS")
    if count:
        if not count.isdecimal() or int(count) < 1:
            raise ConfigError(
                f"SMART_NUM_THREADS={count!r} is not allowed: it must be a number above 0"
            )
        _check_threads(int(count), torch.get_num_threads())
        torch.set_num_threads(int(count))
    elif "OMP_NUM_THREADS" not in os.environ:
        granted = limits.granted_cpus()
        if granted is not None and granted < torch.get_num_threads():
            torch.set_num_threads(granted)


def _check_threads(count: int, before: int) -> None:
    """Warn of more threads than CPUs, unless there are so many already. Raises ConfigError for so
    many that no answer would end."""
    cpus = limits.usable_cpus()
    cpus = min(cpus, limits.granted_cpus() or cpus)
    if count > MOST_THREADS * cpus:
        raise ConfigError(f"{count} threads are not allowed: this process may use {cpus} CPUs")
    if count > cpus and count != before:
        log.warning("%d threads for %d CPUs wait for each other: fewer are faster", count, cpus)


@functools.cache
def _load_openmp() -> None:
    """Load an OpenMP runtime for the kernels: torch's, or the system's where torch has none. The
    threads of two runtimes would spin against each other. Raises ConfigError without any."""
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
    """Start a sleeping team of more threads than CPUs, so that OpenMP's threads spin only briefly.

    A process that imported torch first has already read the variables that set how long threads
    spin. With more threads than CPUs, OpenMP lets them sleep after 100 rounds. The team is left out
    where threads are short: OpenMP ends the process if it cannot start one."""
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
    if sys.platform in INSTEAD:
        return f"there are no CPU kernels for {INSTEAD[sys.platform]}"
    mine = [variant for variant in reversed(variants()) if variant.machine == platform.machine()]
    if not mine:
        return f"there are no CPU kernels for {platform.machine()}"
    if mine[0].lacking:
        return f"this CPU lacks {', '.join(mine[0].lacking)}, which the CPU kernels need"
    return f"the CPU kernels are not built: {BUILD}"


def _check_age(variant: Variant) -> None:
    """Raise ConfigError, in a clone, for kernels older than their sources: edited code must run."""
    if not (SOURCES.parents[3] / "CMakeLists.txt").exists():
        return
    newest = max(source.stat().st_mtime for source in SOURCES.iterdir())
    if variant.path.stat().st_mtime < newest:
        raise ConfigError(f"the CPU kernels are older than their sources: {BUILD}")
