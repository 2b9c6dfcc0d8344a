"""The package keeps its rooms: sizes and layout that a reviewer would have to count."""

import ast
import collections
import functools
import re
import subprocess
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import smart_decoding

SOURCE = Path(smart_decoding.__file__).parent
LONGEST_FUNCTION = 60  # lines, its docstring included: what fits on a screen
MOST_MODULES_AT_THE_TOP = 9
VLLM_MODULES = ("inputs", "outputs", "sampling_params")  # scripts import by these names
LONGEST_IMPORT_CHAIN = 10  # modules; those that only types or a function need do not count


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


def test_a_class_has_a_name_of_its_own() -> None:
    files = collections.defaultdict(list)
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                files[node.name].append(str(path.relative_to(SOURCE)))
    assert len(files) > 100  # classes are found at all
    assert {name: where for name, where in files.items() if len(where) > 1} == {}


def test_few_modules_stand_outside_of_packages() -> None:
    theirs = ("__main__", *VLLM_MODULES)  # Python's own name, and vLLM's
    ours = [path for path in SOURCE.glob("*.py") if path.stem not in theirs]
    assert len(ours) <= MOST_MODULES_AT_THE_TOP


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


def test_the_makefile_names_files_that_are_there() -> None:
    """Targets that CI does not call would else fail for the next who calls them."""
    root = SOURCE.parents[1]
    targets = re.findall(r"^(test[a-z-]*):", (root / "Makefile").read_text(), re.MULTILINE)
    commands = subprocess.run(
        ["make", "--dry-run", *targets], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"\b(?:tests|tools|benchmarks|examples)/[\w/.-]+", commands))
    assert len(named) > 20  # files are found at all
    assert [name for name in sorted(named) if not (root / name).exists()] == []


def test_chains_of_imports_are_short() -> None:
    modules = {_name(path): path for path in SOURCE.rglob("*.py")}

    @functools.cache
    def longest(name: str) -> tuple[str, ...]:
        body = ast.parse(modules[name].read_text(encoding="utf-8")).body
        below = (longest(other) for other in _imports(body) if other in modules and other != name)
        return (name, *max(below, key=len, default=()))

    chain = max(map(longest, modules), key=len)
    assert len(chain) > 5  # imports are found at all
    assert len(chain) <= LONGEST_IMPORT_CHAIN, " > ".join(chain)


def test_imports_go_in_no_circles() -> None:
    """Nor do those that only types need; those within functions may."""
    modules = {_name(path): path for path in SOURCE.rglob("*.py")}
    below = {
        name: _imported_modules(name, ast.parse(path.read_text(encoding="utf-8")).body, modules)
        for name, path in modules.items()
    }
    reached = {name: _reached(name, below) for name in below}
    circles = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in below
        if name in reached[name]
    }
    assert sum(map(len, below.values())) > len(modules)  # imports are found at all
    assert circles == set()


def _reached(name: str, below: Mapping[str, set[str]]) -> set[str]:
    """All that a module imports, and what that imports, and so on."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        new = below[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def _imported_modules(name: str, body: Sequence[ast.stmt], modules: Container[str]) -> set[str]:
    """Our modules that a module imports, for types too. One from a package does not count as the
    package."""
    found = set()
    for statement in body:
        if isinstance(statement, ast.If | ast.Try):
            for part in (statement.body, statement.orelse):
                found |= _imported_modules(name, part, modules)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
            found |= {one if one in modules else statement.module for one in names}
        elif isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
    return {one for one in found if one in modules and one != name}


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(body: Sequence[ast.stmt]) -> Iterator[str]:
    """What a module imports when it is imported: modules, or names of them."""
    for statement in body:
        if isinstance(statement, ast.If):
            for_types = "TYPE_CHECKING" in ast.dump(statement.test)
            yield from _imports([*([] if for_types else statement.body), *statement.orelse])
        elif isinstance(statement, ast.Try):
            yield from _imports(statement.body)
        elif isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)


def test_private_parts_of_libraries_have_an_upper_bound() -> None:
    """gguf's reader and uvicorn's connections are extended; nobody imports a private module."""
    private = [
        f"{path.name}: {node.module}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and "._" in (node.module or "")
    ]
    assert private == []
    requirements = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for library in ("gguf", "uvicorn"):
        assert re.search(rf'"{library}>=[\d.]+,<[\d.]+"', requirements), library
