"""`python -m pictures_model COMMAND`: the demonstration model, from its parts to its figures.

    ask         answer a question about an image: `smart run` with this model and its head
    bench       compare policies: `smart bench` with this model, its head and its task `pictures`
    assemble    put the model's folder together and print its path
    accuracy    ask about generated pictures that were not trained on, and about blank ones
    acceptance  how draft heads do on long answers
    questions   write generated pictures with questions, for `smart train --images`
    train       train the model anew, stage by stage

`python -m pictures_model COMMAND --help` lists the options.
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "ask": ("pictures_model.commands", "ask"),
    "bench": ("pictures_model.commands", "bench"),
    "assemble": ("pictures_model.commands", "assemble"),
    "accuracy": ("pictures_model.accuracy", "main"),
    "acceptance": ("pictures_model.acceptance", "main"),
    "questions": ("pictures_model.commands", "write_questions"),
    "train": ("pictures_model.training.stages", "main"),
}


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit code."""
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, file=sys.stdout if argv in (["-h"], ["--help"]) else sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    module, function = COMMANDS[argv[0]]
    code: int = getattr(import_module(module), function)(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
