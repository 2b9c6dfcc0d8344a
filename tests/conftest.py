"""What tests of several packages share."""

from collections.abc import Iterator

import pytest

from smart_decoding.kernels import library


@pytest.fixture(scope="module", params=library.runnable() or ["none"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the CPU kernels that this CPU can run, one after another; none is a failure."""
    from smart_decoding.kernels.library import unavailable

    assert request.param != "none", unavailable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "chosen", lambda: request.param)
        yield request.param
