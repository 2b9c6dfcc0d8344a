"""`python -m smart_decoding` is the command `smart`."""

import sys

from smart_decoding.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
