"""The command `smart` as `python -m smart_decoding`, where scripts are not on PATH."""

import sys

from smart_decoding.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
