"""Two further suites made from HumanEval and GSM8K by rule: long contexts, and edits that repeat
their input.

Long contexts are what a person would paste: a module of solved functions with one to complete or to
explain, or a sheet of worked exercises with one left. No text occurs twice in a prompt. Edits ask
for a whole function back: with a parameter renamed, one operator repaired, type hints added, or a
line of logging. Both are functions of the fetched files alone, so a checksum of those pins them
too; both are for evaluation only, as their sources are.

Needed by docs/will-it-help.md, "By kind of text".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

from smart_decoding.measuring.tasks import TASKS, gsm8k, human_eval

Task = Mapping[str, str]
LONG_PROMPT = 4096  # tokens of the longest of the task `long`, for which memory is then made
LONG_CHARACTERS = (3800, 5000, 6400, 8200, 9800)  # of context, in turn: 1,200 to 3,800 tokens
STRIDE = 7  # examples of neighbouring long prompts start so far apart
SWAPS = (
    ("<=", "<"),
    (">=", ">"),
    ("<", "<="),
    (">", ">="),
    ("==", "!="),
    ("+", "-"),
    ("and", "or"),
)  # right, wrong
_NOTES = re.compile(r"<<[^>]*>>")  # GSM8K's calculator marks


def long_contexts(code: Sequence[Task], maths: Sequence[Task]) -> list[str]:
    """60 prompts of 1k to 4k tokens: code to complete, code to explain and exercises, in turn."""
    kinds = (_complete, _explain, _exercises)
    return [
        kinds[i % 3](maths if i % 3 == 2 else code, i, LONG_CHARACTERS[i % len(LONG_CHARACTERS)])
        for i in range(60)
    ]


def edits(code: Sequence[Task]) -> list[str]:
    """Return one edit of each HumanEval solution that allows one; four kinds in turn."""
    kinds = (_rename, _repair, _hints, _logging)
    made = []
    for i, task in enumerate(code):
        order = [kinds[(i + k) % len(kinds)] for k in range(len(kinds))]
        prompt = next((text for kind in order if (text := kind(task)) is not None), None)
        if prompt is not None:
            made.append(prompt)
    return made


def solution(task: Task) -> str:
    """Return the function as HumanEval solves it, with its docstring."""
    return task["prompt"].strip() + "\n" + task["canonical_solution"].rstrip()


def _gather(texts: Sequence[str], start: int, characters: int) -> list[str]:
    """Texts from `start` on, in circle, until they have so many characters; each at most once."""
    taken: list[str] = []
    for k in range(len(texts)):
        if sum(map(len, taken)) >= characters:
            break
        taken.append(texts[(start + k) % len(texts)])
    return taken


def _complete(code: Sequence[Task], number: int, characters: int) -> str:
    at = number * STRIDE % len(code)
    others = [solution(task) for i, task in enumerate(code) if i != at]
    module = "\n\n\n".join(_gather(others, at, characters))
    return (
        f"This is a Python module:\n```python\n{module}\n```\n"
        f"Complete one more function of it:\n```python\n{code[at]['prompt'].strip()}\n```"
    )


def _explain(code: Sequence[Task], number: int, characters: int) -> str:
    at = number * STRIDE % len(code)
    functions = _gather([solution(task) for task in code], at, characters)
    name = code[(at + len(functions) // 2) % len(code)]["entry_point"]
    module = "\n\n\n".join(functions)
    wish = f"Explain step by step how `{name}` works, with an example."
    return f"Read this Python module:\n```python\n{module}\n```\n{wish}"


def _exercises(maths: Sequence[Task], number: int, characters: int) -> str:
    at = number * STRIDE % len(maths)
    solved = [
        f"Question: {task['prompt']}\nAnswer: {_worked(task['upstream_answer'])}"
        for i, task in enumerate(maths)
        if i != at
    ]
    sheet = "\n\n".join(_gather(solved, at, characters))
    return (
        f"Here are some worked exercises.\n\n{sheet}\n\nAnswer the last one in the same way.\n\n"
        f"Question: {maths[at]['prompt']}"
    )


def _worked(answer: str) -> str:
    return _NOTES.sub("", answer).replace("#### ", "The answer is ")


def _request(wish: str, source: str) -> str:
    return f"{wish} Answer with the whole function.\n```python\n{source}\n```"


def _function(task: Task) -> ast.FunctionDef | None:
    tree = ast.parse(solution(task))
    found = [
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == task["entry_point"]
    ]
    return found[0] if found else None


def _rename(task: Task) -> str | None:
    function = _function(task)
    if function is None or not function.args.args:
        return None
    old = function.args.args[0].arg
    return _request(
        f"Rename the parameter `{old}` of `{function.name}` to `{old}_value`.", solution(task)
    )


def _repair(task: Task) -> str | None:
    """Return the body with one operator swapped for a wrong one."""
    body = task["canonical_solution"]
    for right, wrong in SWAPS:
        broken, count = re.subn(rf"(?<= ){re.escape(right)}(?= )", wrong, body, count=1)
        if count:
            source = solution({**task, "canonical_solution": broken})
            return _request(
                f"`{task['entry_point']}` has a bug: one operator is wrong. Fix it.", source
            )
    return None


def _hints(task: Task) -> str | None:
    function = _function(task)
    if function is None or not function.args.args or any(a.annotation for a in function.args.args):
        return None
    return _request(
        f"Add type hints to the signature of `{function.name}` and change nothing else.",
        solution(task),
    )


def _logging(task: Task) -> str | None:
    name = task["entry_point"]
    return _request(
        f"Print the arguments of `{name}` at its start and change nothing else.", solution(task)
    )


# importing this module adds the tasks to those that `load_task` knows
TASKS["long"] = lambda: long_contexts(human_eval(), gsm8k())
TASKS["edit"] = lambda: edits(human_eval())
