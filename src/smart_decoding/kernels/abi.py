"""The plain C interface of the kernels as ctypes, read from csrc/abi.h and compared with the layout
in the loaded library.

It uses no binding library: a kernel library for each kind of CPU is loaded by name, one wheel
serves every Python, and a build needs no Python headers."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.kernels.memory import pointer

HEADER = Path(__file__).parent / "csrc" / "abi.h"
LAYOUT = HEADER.with_name("layout.inc")
_STALE = "it was not built from this version's csrc/abi.h; build the kernels again (make install)"
_SCALARS: dict[str, Any] = {
    "int8_t": ctypes.c_int8,
    "uint8_t": ctypes.c_uint8,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_STRUCT = re.compile(r"^struct (\w+) \{(.*?)^\};", re.MULTILINE | re.DOTALL)
_FUNCTION = re.compile(r"^([\w ]+?[ *]+)(smart_\w+)\(([^)]*)\);", re.MULTILINE | re.DOTALL)


def _text() -> str:
    return re.sub(r"//.*", "", HEADER.read_text(encoding="utf-8"))


def _type(declared: str) -> Any:
    """Return the ctypes type of a C type; None for void, and c_void_p for pointers."""
    if "*" in declared:
        return ctypes.c_char_p if declared.split() == ["const", "char*"] else ctypes.c_void_p
    name = declared.replace("const", "").replace("struct", "").strip()
    if name == "void":
        return None
    return _SCALARS[name] if name in _SCALARS else structure(name)


def _fields(body: str) -> Iterator[tuple[str, Any]]:
    for line in filter(None, map(str.strip, body.split(";"))):
        base, first = re.fullmatch(r"((?:const |struct )*\w+)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
        for declared in first.split(","):
            yield (
                declared.replace("const", "").strip("* \n"),
                _type(base + "*" * declared.count("*")),
            )


@functools.cache
def _bodies() -> dict[str, str]:
    return dict(_STRUCT.findall(_text()))


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """Return the structure `name` of abi.h."""
    return type(
        name,
        (ctypes.Structure,),
        {"_fields_": list(_fields(_bodies()[name])), "__doc__": f"`{name}` of abi.h."},
    )


def layout() -> str:
    """Return every structure's size and every field's offset in Python, in the form of
    smart_layout."""
    return "".join(
        f"{name} {ctypes.sizeof(structure(name))}:"
        + "".join(f" {field} {getattr(structure(name), field).offset}" for field in _names(name))
        + "\n"
        for name in _bodies()
    )


def layout_source() -> str:
    """Return the text of csrc/layout.inc, by which smart_layout lists the compiler's layout."""
    lines = [
        "// Made by `python -m smart_decoding.kernels.abi` from abi.h: "
        "what layout.cpp says of each structure.\n"
    ]
    for name in _bodies():
        lines += [
            f"STRUCT({name})\n",
            *(f"FIELD({name}, {field})\n" for field in _names(name)),
            "END\n",
        ]
    return "".join(lines)


def _names(name: str) -> list[str]:
    return [field[0] for field in structure(name)._fields_]


class Pointer(ctypes.c_void_p):
    """An argument of the kernels: an address, None, or a tensor or array that lies there."""

    @classmethod
    def from_param(cls, value: Any) -> Any:
        """Convert an argument, as ctypes requires. Numbers and structures come first: rounds pass
        these."""
        try:
            return ctypes.c_void_p.from_param(value)
        except TypeError:
            return ctypes.c_void_p(pointer(value))


def declare(library: ctypes.CDLL) -> None:
    """Set the types of the library's functions. Raises ConfigError for a library that was built
    from another abi.h."""
    for result, name, arguments in _FUNCTION.findall(_text()):
        function = getattr(library, name, None)
        if function is None:
            raise ConfigError(f"{library._name} lacks {name}: {_STALE}")
        function.restype = _type(result)
        types = [
            re.sub(r"\w+$", "", argument.strip())
            for argument in arguments.split(",")
            if argument.strip()
        ]
        ctypes_of = [_type(each) for each in types]
        function.argtypes = [Pointer if each is ctypes.c_void_p else each for each in ctypes_of]
    if library.smart_layout().decode() != layout():
        raise ConfigError(f"{library._name} lays structures out in another way: {_STALE}")


if __name__ == "__main__":
    LAYOUT.write_text(layout_source(), encoding="utf-8")
