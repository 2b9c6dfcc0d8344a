"""What programs that we start inherit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from smart_decoding.kernels import children

SEEN = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
STARTED = f"""
import subprocess, sys
import smart_decoding
from smart_decoding.kernels import children
subprocess.run([sys.executable, "-c", {SEEN!r}], env=children.environment())
"""


@pytest.mark.parametrize(("given", "seen"), [({}, "None"), ({"GOMP_SPINCOUNT": "150"}, "150")])
def test_they_do_not_inherit_what_this_package_sets(given: dict[str, str], seen: str) -> None:
    """What the user set stays, even where it is what we would set."""
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, env={**own, **given}, capture_output=True, text=True)
    assert done.stdout.strip() == seen, done.stderr


def test_a_variable_that_was_changed_since_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_OURS", {})
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    children.set_for_us("GOMP_SPINCOUNT", "9")
    assert os.environ["GOMP_SPINCOUNT"] == "9"
    assert "GOMP_SPINCOUNT" not in children.environment()
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert children.environment()["GOMP_SPINCOUNT"] == "77"
    children.become_another_program()
    assert os.environ["GOMP_SPINCOUNT"] == "77"
    monkeypatch.setenv("GOMP_SPINCOUNT", "9")
    children.become_another_program()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_group_is_waited_for_until_its_last_process_is_gone() -> None:
    """The first one may be gone before those that it started."""
    code = "import subprocess, sys, time; "
    code += "subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(3)'])"
    with subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True) as process:
        process.wait()
        began = time.monotonic()
        children.wait_for_group(process.pid, 0.1)
        assert time.monotonic() - began < 2.5  # not for ever
        children.wait_for_group(process.pid, 20.0)
        assert 0.3 < time.monotonic() - began < 20.0
        assert not children._runs(process.pid)


def test_a_stopped_process_ends_with_its_parent() -> None:
    code = "import os, subprocess, sys, time; from smart_decoding.kernels import children; "
    code += "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'], "
    code += "preexec_fn=children.end_with_parent); os.kill(child.pid, 19); "
    code += "print(child.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.02)
    raise AssertionError("it is still there")
