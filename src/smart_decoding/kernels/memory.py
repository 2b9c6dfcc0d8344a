"""Where arrays lie, for native code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def address(array: Any) -> int:
    """The address of a numpy array's first element. Raises ValueError if its elements do not lie
    next to each other."""
    interface = array.__array_interface__
    if interface["strides"] is not None:
        raise ValueError("arrays for native code must be contiguous")
    at: int = interface["data"][0]
    return at


def address_or_none(array: Any) -> int | None:
    """The address, or None of None: a null pointer."""
    return None if array is None else address(array)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a tensor's first element, or None of None: a null pointer."""
    return None if tensor is None else tensor.data_ptr()
