"""`smart chat` with a scripted LLM, whose answer is in $ANSWER, as a program."""

import os
import sys
from types import ModuleType

from scripted import FakeLLM

from smart_decoding.cli import main as cli

FakeLLM.pieces = ("", os.environ.get("ANSWER", "Paris is the capital."))
module = ModuleType("smart_decoding.llm")
module.LLM = FakeLLM
sys.modules["smart_decoding.llm"] = module
sys.exit(cli.main(["chat", *sys.argv[1:]]))
