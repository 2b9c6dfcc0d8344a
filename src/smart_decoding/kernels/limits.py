"""The system's limits for this process: CPUs, threads and memory, by affinity and by control groups
(cgroups), as containers and systemd's `CPUQuota=` and `MemoryMax=` set them; and preemptions.

The limits of all groups above the process's own hold, too. Both versions of control groups are
read, each with its own names of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

resource: Any
try:
    import resource
except ImportError:  # not on Windows
    resource = None

GROUPS = Path("/sys/fs/cgroup")  # where control groups are mounted
OWN_GROUPS = Path("/proc/self/cgroup")  # lines of number:controllers:path
UNLIMITED = 1 << 60  # bytes beyond any memory: version 1 reports so many where there is no limit
THREADS_LEFT = 64  # threads left to other programs, where a team of threads is started


def usable_cpus() -> int:
    """Count the CPUs that this process may run on; all CPUs where the affinity is unknown."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def granted_cpus() -> int | None:
    """Count the CPUs whose time the control groups grant, rounded up; None without a limit."""
    found = []
    for group in _groups("cpu"):
        second = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
        quota, _, period = (_read(group / "cpu.max") or second).partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):  # else "max", or -1
            found.append(max(1, -(-int(quota) // int(period))))
    return min(found, default=None)


def preemptions() -> int:
    """Count how often a thread of this process had to leave its CPU to another thread, of any
    process; 0 where the system has no such count."""
    if resource is None:
        return 0
    count: int = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return count


def free_memory() -> int | None:
    """Return the bytes that the control groups leave, cached files counted as free; None without a
    limit."""
    found = []
    for group in _groups("memory"):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < UNLIMITED:
            found.append(limit - used + _cached(group / "memory.stat"))
    return min(found, default=None)


def may_start(count: int) -> bool:
    """Return whether so many threads and a margin may be started, by the limits of the user and of
    the control groups. All threads of the system count as the user's: a cautious guess."""
    need = count + THREADS_LEFT
    if resource is not None:
        most, _ = resource.getrlimit(resource.RLIMIT_NPROC)
        if most != resource.RLIM_INFINITY and most - _threads_running() < need:
            return False
    for group in _groups("pids"):
        limit, used = _number(group / "pids.max"), _number(group / "pids.current")
        if limit is not None and used is not None and limit - used < need:
            return False
    return True


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of all above it; some may not be there."""
    lines = _read(OWN_GROUPS).splitlines() or ["0::/", f"1:{controller}:/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        mounts = [GROUPS] if not controllers else []  # version 2 has one hierarchy for all
        if controller in controllers.split(","):
            mounts = [GROUPS / controller, GROUPS / controllers]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield mount.joinpath(*parts[:depth])


def _cached(path: Path) -> int:
    """Return the bytes of cached files, which the system can free; in version 1 with the groups
    below."""
    stat = dict(line.split() for line in _read(path).splitlines() if len(line.split()) == 2)
    names = ("inactive_file", "active_file")
    sizes = (stat.get(f"total_{name}", stat.get(name, "")) for name in names)
    return sum(int(size) for size in sizes if size.isdecimal())


def _number(*paths: Path) -> int | None:
    """Return the number in the first of the files that has one."""
    texts = map(_read, paths)
    return next((int(text) for text in texts if text.isdecimal()), None)


def _read(path: Path) -> str:
    """Return the text of a file of the system, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _threads_running() -> int:
    _, _, threads = _read(Path("/proc/loadavg")).partition("/")
    count = threads.partition(" ")[0]
    return int(count) if count.isdecimal() else 0
