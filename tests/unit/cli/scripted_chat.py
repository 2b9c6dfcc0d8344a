"""`smart chat` with a scripted LLM, as a program. Its answer is in $ANSWER, and comes in $PAUSE
seconds behind "Well, it"."""

import os
import sys
import time
from collections.abc import Iterator
from types import ModuleType

from scripted import FakeLLM

from smart_decoding.cli import main as cli


class Pieces:
    """Both pieces of the answer, the second one after a pause."""

    def __iter__(self) -> Iterator[str]:
        pause = float(os.environ.get("PAUSE", "0"))
        yield "Well, it " if pause else ""
        time.sleep(pause)
        yield os.environ.get("ANSWER", "Paris is the capital.")


FakeLLM.pieces = Pieces()
module = ModuleType("smart_decoding.llm")
module.LLM = FakeLLM
sys.modules["smart_decoding.llm"] = module
sys.exit(cli.main(["chat", *sys.argv[1:]]))
