"""Addresses of arrays, for native code."""

from __future__ import annotations

from typing import Any


def address(array: Any) -> int:
    """Return the address of a numpy array's first element. Raises ValueError if its elements do not
    lie next to each other."""
    interface = array.__array_interface__
    if interface["strides"] is not None:
        raise ValueError("arrays for native code must be contiguous")
    at: int = interface["data"][0]
    return at


def pointer(value: Any) -> int | None:
    """Return the address of an array's or tensor's first element, or None of None: a null
    pointer."""
    if value is None:
        return None
    return value.data_ptr() if hasattr(value, "data_ptr") else address(value)
