"""`smart chat` with a scripted LLM, as a program."""

import sys
from types import ModuleType

from scripted import FakeLLM

from smart_decoding.cli import main as cli

module = ModuleType("smart_decoding.llm")
module.LLM = FakeLLM
sys.modules["smart_decoding.llm"] = module
sys.exit(cli.main(["chat", *sys.argv[1:]]))
