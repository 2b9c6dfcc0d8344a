"""The listening socket, within the number of files that the process may have open."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from pathlib import Path

from smart_decoding.errors import ConfigError

log = logging.getLogger("smart.server")
# Connections accepted in one turn of the event loop. Refused ones are closed some turns later, and
# those under way must leave files for others.
AT_ONCE = 16
BACKLOG = 2048  # connections that wait to be accepted
SPARE = 128  # files for all but connections: models, caches, and connections of one look
QUIET = 60.0  # seconds between two lines of the log that say the same
_FULL = (errno.EMFILE, errno.ENFILE)


def allowed_connections(requested: int) -> int:
    """Return how many connections may be open at once, at most `requested`.

    Raises the soft limit of open files to the hard one, as far as needed. Raises ConfigError if
    there is no room for any."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return requested
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _open_files()
    needed = used + SPARE + requested
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return requested
    raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if raised > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= needed:
        return requested
    allowed = soft - used - SPARE
    if allowed < 1:
        raise ConfigError(
            f"too many open files: {soft} are allowed, which leaves none for connections: "
            f"allow more, such as ulimit -n {needed}"
        )
    log.warning(
        f"{allowed} connections at once instead of {requested}: only {soft} files may be open; "
        f"ulimit -n {needed} allows all"
    )
    return allowed


def _open_files() -> int:
    try:
        return sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:
        return 64


class Listener(socket.socket):
    """A listening socket that drops newcomers while the process can open no more files.

    Newcomers would otherwise stay ready to be accepted, and the event loop would try again without
    end. A file in reserve is closed to accept and drop each of them."""

    def __init__(self, *options: int) -> None:
        super().__init__(*options)
        self._reserve = os.open(os.devnull, os.O_RDONLY)
        self._said = -QUIET

    def accept(self) -> tuple[socket.socket, object]:
        """Accept a connection. Raises BlockingIOError if nobody waits, or all were dropped."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _FULL:
                raise
        dropped = 0
        try:
            while dropped < BACKLOG:
                self._drop_one()
                dropped += 1
        except BlockingIOError:
            pass
        finally:
            if time.monotonic() - self._said > QUIET:
                self._said = time.monotonic()
                log.error(f"too many files are open: {dropped} new connections were dropped")
        raise BlockingIOError(errno.EAGAIN, "no file is left for a connection")

    def _drop_one(self) -> None:
        """Accept and close one. Raises BlockingIOError if nobody waits, OSError if no file can be
        opened even so."""
        self._give_up_reserve()
        try:
            newcomer, _ = super().accept()
            newcomer.close()
        finally:
            with contextlib.suppress(OSError):  # another thread was faster: the next time, then
                self._reserve = os.open(os.devnull, os.O_RDONLY)

    def _give_up_reserve(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def close(self) -> None:
        """Close the socket and its reserve."""
        self._give_up_reserve()
        super().close()
