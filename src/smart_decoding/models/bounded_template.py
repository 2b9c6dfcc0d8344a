"""Jinja's sandbox with an end: a template that loops for ever, or makes text without bound, fails.

What repeats (loops, their conditions, macros, blocks) looks at the clock; operators and arguments
that make large values look at their size. A single call that works long on values within these
bounds is not interrupted.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import wraps
from types import BuiltinMethodType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 1.0  # of a thread's own time for one conversation; real ones take milliseconds
LONGEST = 1 << 23  # characters of a text, items of a list
_WORK = 1 << 26  # characters times a width
_LARGEST = 1 << 64  # of a number
_POWER = 64
_HUGE_WIDTH = re.compile(r"\d{5}|%[^a-zA-Z]*\*")  # in a format


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox, whose templates end."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._clock = threading.local()
        del self.globals["lipsum"]

    def renderer(self, source: str) -> Callable[[Mapping[str, Any]], str]:
        """A function from variables to text, which raises what the template raises, and
        TemplateError where it is stopped. Filters are those that the environment has by now."""
        self.filters = {name: _bounded(filter_) for name, filter_ in self.filters.items()}
        tree = _Watched().visit(self.parse(source))
        template = self.template_class.from_code(self, self.compile(tree), self.make_globals(None))

        def render(variables: Mapping[str, Any]) -> str:
            self._clock.end = time.thread_time() + SECONDS
            pieces = []
            length = 0
            for piece in template.root_render_func(template.new_context(dict(variables))):
                length += len(piece)
                _require(length <= LONGEST)
                pieces.append(piece)
            return "".join(pieces)

        return render

    def watch(self) -> bool:
        """What is called wherever a template repeats itself."""
        _require(time.thread_time() < self._clock.end)
        return True

    def joined(self, *parts: Any) -> str:
        """The operator ~."""
        return self.concat(map(str, parts))

    @staticmethod
    def concat(parts: Any) -> str:
        """Joins what a template writes."""
        texts = list(parts)
        _require(sum(map(len, texts)) <= LONGEST)
        return "".join(texts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator that can make a value much larger than its operands."""
        if operator == "**":
            _require(_magnitude(right) <= _POWER)
        elif operator == "*":
            _require(_length(left) * _magnitude(right) <= LONGEST)
            _require(_magnitude(left) * _length(right) <= LONGEST)
        elif operator == "%" and isinstance(left, str):
            _require(not _HUGE_WIDTH.search(left))
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call; the names are Jinja's, which leaves all others to the template's keywords."""
        if isinstance(__obj, BuiltinMethodType):  # such as a text's `center`
            _check(__obj.__self__, *args, *kwargs.values())
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A text's `format`, if `value` is one."""
        wrapper = super().wrap_str_format(value)
        if wrapper is not None:
            _require(not _HUGE_WIDTH.search(value.__self__))
        return wrapper


class _Watched(NodeTransformer):
    """Puts the clock into what repeats, out of reach of the template's own names."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # Jinja's name
        node = self._with_clock(node)
        if node.test is not None:
            node.test = nodes.And(_call("watch"), node.test)
        return node

    def _with_clock(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("watch")))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _with_clock  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("joined", node.nodes)


def _call(name: str, arguments: list[nodes.Expr] | None = None) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, arguments or [], [], None, None)


def _bounded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are bounded. Some get the environment before a value."""

    @wraps(filter_)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[1:] if hasattr(filter_, "jinja_pass_arg") else args
        _check(value, *rest, *kwargs.values())
        return _checked(filter_(*args, **kwargs))

    return bounded


def _check(value: Any, *arguments: Any) -> None:
    """Numbers are widths and counts, for each character or item of the value at worst."""
    _require(all(max(1, _length(value)) * _magnitude(each) <= _WORK for each in arguments))


def _checked(value: Any) -> Any:
    _require(_length(value) <= LONGEST and _magnitude(value) < _LARGEST)
    return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _magnitude(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 0


def _require(is_bounded: bool) -> None:
    if not is_bounded:
        raise TemplateError("it takes too long, or makes too much text")
