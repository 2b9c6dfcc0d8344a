"""What runs only with a GPU or Triton uses names that exist: `make test` has neither. Every file of
the laboratory says who needs it."""

from __future__ import annotations

import ast
import functools
import symtable
from collections.abc import Iterator
from pathlib import Path

import smart_decoding
import smart_lab

PACKAGES = {each.__name__: Path(each.__file__).parent for each in (smart_decoding, smart_lab)}
USERS = (PACKAGES["smart_lab"], Path(__file__).parents[1] / "gpu")


def test_the_laboratory_uses_names_that_the_package_has() -> None:
    used = {
        (path.name, module, name)
        for folder in USERS
        for path in folder.rglob("*.py")
        for module, name in names_used(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert ("gpu_parity.py", "smart_decoding.models.torch.device_sampling", "draw") in used
    assert [each for each in sorted(used) if each[2] not in names_of(each[1])] == []


def test_every_file_says_which_page_test_or_result_needs_it() -> None:
    tools = Path(__file__).parents[2] / "tools"
    files = [*PACKAGES["smart_lab"].rglob("*.py"), *tools.glob("*.py")]
    silent = [
        path.name
        for path in files
        if path.name != "__init__.py"
        and "Needed by " not in (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")
    ]
    assert len(files) > 50
    assert silent == []


def names_used(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names that a file takes from modules of the packages: imported, or as attributes."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            for alias in node.names:
                if source_of(f"{node.module}.{alias.name}").exists():
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module not in PACKAGES:  # whose names are found when they are asked for
                    yield str(node.module), alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None:
                yield module, node.attr


def source_of(module: str) -> Path:
    package, *parts = module.split(".")
    base = PACKAGES[package].joinpath(*parts)
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


@functools.cache
def names_of(module: str) -> set[str]:
    """What a module's source binds; it is not imported."""
    path = source_of(module)
    table = symtable.symtable(path.read_text(encoding="utf-8"), str(path), "exec")
    return {each.get_name() for each in table.get_symbols() if each.is_local()} | {"__file__"}
