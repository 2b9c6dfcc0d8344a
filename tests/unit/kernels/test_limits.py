"""What the system lets a process use: control groups of both versions, and systems without them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smart_decoding.kernels import limits

GB = 1 << 30
UNIT = "/system.slice/smart.service"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hierarchy, of which this process is in UNIT."""
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"0::{UNIT}\n")
    return tmp_path / "cgroup"


def write(root: Path, group: str, **files: object) -> None:
    folder = root / group.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_limits_of_systemds_unit_hold(root: Path) -> None:
    """CPUQuota=150% and MemoryMax=4G; the root of version 2 has no files of limits."""
    root.mkdir()
    assert limits.granted_cpus() is None
    assert limits.free_memory() is None
    write(root, UNIT, cpu__max="150000 100000", memory__max=4 * GB, memory__current=3 * GB)
    write(root, UNIT, memory__stat=f"anon 7\ninactive_file {GB // 2}\nactive_file 5")
    assert limits.granted_cpus() == 2
    assert limits.free_memory() == GB + GB // 2 + 5


def test_the_least_limit_of_all_groups_above_holds(root: Path) -> None:
    write(root, UNIT, cpu__max="800000 100000", memory__max=4 * GB, memory__current=GB)
    write(root, "/system.slice", cpu__max="100000 100000", memory__max="max", memory__current=GB)
    write(root, "/", cpu__max="400000 100000", memory__max=3 * GB, memory__current=2 * GB)
    assert limits.granted_cpus() == 1
    assert limits.free_memory() == GB


def test_groups_of_others_do_not_count(root: Path) -> None:
    write(root, "/user.slice", cpu__max="100000 100000", memory__max=GB, memory__current=GB)
    assert limits.granted_cpus() is None
    assert limits.free_memory() is None


def test_version_1_has_a_hierarchy_for_each_controller(root: Path) -> None:
    lines = ["12:pids:/a", "5:memory:/a", "3:cpu,cpuacct:/a/b", "0::/"]
    limits.OWN_GROUPS.write_text("\n".join(lines))
    unlimited = 9223372036854771712
    usage = {"memory__usage_in_bytes": GB}
    write(root, "memory/a", memory__limit_in_bytes=unlimited, **usage)
    write(root, "cpu,cpuacct/a/b", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert limits.granted_cpus() is None
    assert limits.free_memory() is None
    write(root, "cpu,cpuacct/a", cpu__cfs_quota_us=250000, cpu__cfs_period_us=100000)
    write(root, "memory/a", memory__limit_in_bytes=2 * GB, **usage)
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100\ntotal_active_file 20"
    write(root, "memory/a", memory__stat=stat)
    assert limits.granted_cpus() == 3
    assert limits.free_memory() == GB + 120
    write(root, "pids/a", pids__max=100, pids__current=40)
    assert not limits.may_start(10)


@pytest.mark.parametrize("own", ["", "nonsense", "0::/../..", "1:memory:/docker/4711\n0::/"])
def test_a_container_sees_its_own_group_as_the_root(own: str, root: Path) -> None:
    limits.OWN_GROUPS.write_text(own or "0::/\n")
    if own == "nonsense":
        limits.OWN_GROUPS.unlink()
    if "docker" in own:
        write(root, "memory", memory__limit_in_bytes=2 * GB, memory__usage_in_bytes=GB)
    else:
        write(root, "/", memory__max=2 * GB, memory__current=GB)
    assert limits.free_memory() == GB


ELSEWHERE = """
import os, sys
sys.modules["resource"] = None
del os.sched_getaffinity
from smart_decoding.measuring.machine import machine
from smart_decoding.cli import main
from smart_decoding.kernels import library, limits
from smart_decoding.llm import LLM
os.environ["SMART_NUM_THREADS"] = "1"
library.set_threads()
assert limits.usable_cpus() == machine()["cores"] == os.cpu_count()
assert limits.may_start(1)
print("imported")
"""


def test_systems_without_affinity_or_limits_of_processes() -> None:
    """As macOS and Windows: where these are missing they are not needed."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout == "imported\n", done.stderr


COMPETING = """
import os, sys, time
from smart_decoding.kernels.limits import preemptions
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.stdin.read(1)  # both begin together
before, end = preemptions(), time.monotonic() + 0.5
while time.monotonic() < end:
    pass
print(preemptions() - before)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_processes_that_share_a_cpu_interrupt_each_other() -> None:
    command = [sys.executable, "-c", COMPETING]
    pipe = subprocess.PIPE
    both = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("g")
        process.stdin.close()
    for process in both:
        with process:
            assert process.stdout is not None
            assert int(process.stdout.read()) > 1


def test_a_system_that_counts_no_interruptions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "resource", None)
    assert limits.preemptions() == 0
