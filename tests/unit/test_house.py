"""The package keeps its rooms: sizes and layout that a reviewer would have to count."""

import ast
from pathlib import Path

import smart_decoding

SOURCE = Path(smart_decoding.__file__).parent
LONGEST_FUNCTION = 40  # lines, its docstring included: what fits on a screen
MOST_MODULES_AT_THE_TOP = 8


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{path.relative_to(SOURCE)}: {node.name}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]
    assert long == []


def test_few_modules_stand_outside_of_packages() -> None:
    assert len([*SOURCE.glob("*.py")]) <= MOST_MODULES_AT_THE_TOP


def test_a_package_says_what_lives_there() -> None:
    silent = [
        str(path.parent.relative_to(SOURCE))
        for path in SOURCE.rglob("__init__.py")
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_the_formatter_formats_everything() -> None:
    packed = [path for path in SOURCE.rglob("*.py") if "# fmt:" in path.read_text(encoding="utf-8")]
    assert packed == []
