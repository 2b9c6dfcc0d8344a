"""`report` draws what a small fixed result says, and says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from measured import FIXED_LONG, results

from smart_decoding.errors import ConfigError
from smart_lab import plots
from smart_lab.results import Results


def test_speedups_have_bands_and_the_line_at_one() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = plots.drawn(Results.from_dict(results())).axes
    policies = [line for line in axes.lines if line.get_linestyle() == "-"]
    (level,) = [line for line in axes.lines if line not in policies]
    assert list(level.get_ydata()) == [1.0, 1.0]
    assert {line.get_label(): list(line.get_ydata()) for line in policies} == {
        "smart": [1.25, 0.99],
        FIXED_LONG: [1.31, 0.62],
    }
    bands = [each.get_datalim(axes.transData) for each in axes.collections]
    assert [(band.y0, band.y1) for band in bands] == [(0.9, 1.35), (0.58, 1.4)]
    (below,) = axes.patches
    assert below.get_y() + below.get_height() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no 'runs'"),
        ('{"runs": []}', "has no 'runs'"),
        ('{"runs": [3]}', "must be an object"),
        ('{"runs": [{"policy": "off"}]}', "no usable 'task'"),
        ('{"runs": [{"policy": "off", "task": "all", "batch_size": 1}]}', "no 'speedup'"),
        (
            '{"runs": [{"policy": "off", "task": "code", "batch_size": 1, "speedup": 1}]}',
            "no runs of the task 'all'",
        ),
    ],
)
def test_what_is_no_result_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Results.read(tmp_path / "r.json")
