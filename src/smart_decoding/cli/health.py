"""Docker's health check, `python -m smart_decoding.cli.health`: whether the server lives that is
process 1. Its command line, and a file named there, tell the address."""

from __future__ import annotations

import sys
from http.client import HTTPConnection
from pathlib import Path

from smart_decoding.cli.main import build_parser
from smart_decoding.cli.serve_options import complete

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def main(command: Path = Path("/proc/1/cmdline")) -> int:
    """Return 0 if it loads or runs, else 1."""
    words = command.read_text().split("\0")[:-1]
    args = build_parser("serve").parse_args(words[words.index("serve") :])
    complete(args)
    connection = HTTPConnection(_ANY.get(args.host, args.host), args.port, timeout=5)
    try:  # urllib would go through a proxy
        connection.request("GET", "/health/live")
        return 0 if connection.getresponse().status == 200 else 1
    except OSError as error:
        print(f"{args.host} port {args.port}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
