"""Recordings on disk: what comes back is what went in; anything else is refused in one line."""

from dataclasses import astuple

import numpy as np
import pytest
import worlds

from smart_decoding.core.calibration import Calibration, Forecast
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import CapacityError, ConfigError
from smart_lab.recorder import fit_host, measure_host
from smart_lab.recording import Wide, record
from smart_lab.replay import HostCosts, replay
from smart_lab.trace import Trace, read_trace, write_trace

COST = CostModel.from_table({1: {1: 1.0, 64: 2.0}}, {1: 0.1, 64: 0.2}, 0.01)


@pytest.fixture(scope="module")
def trace():
    clock = worlds.Clock()
    engine = worlds.engine(clock, drafter=worlds.RuleDrafter(clock))
    engine.policy = Wide(levels=3, children=2, width=4)
    recording = record(engine, worlds.prompts(count=3, tokens=12))
    calibration = Calibration()
    prior = {
        "calibration": calibration.state_dict(),
        "forecast": Forecast(calibration).state_dict(),
    }
    return Trace(
        recording, {"dtype": "fp32"}, (worlds.EOS,), COST, HostCosts(1e-3, 1e-4, 2e-3, 0.0), prior
    )


@pytest.fixture
def file(trace, tmp_path):
    write_trace(tmp_path / "t.smart", trace)
    return tmp_path / "t.smart"


def test_every_position_has_its_tree_however_long_the_prompts_are():
    """Rounds that carry prompts do not draft; a recording must have none beside decoding
    requests."""
    clock = worlds.Clock()
    engine = worlds.engine(clock, drafter=worlds.RuleDrafter(clock))
    engine.policy, chunk = Wide(levels=1, children=2, width=4), engine.scheduler.chunk
    recording = record(engine, worlds.prompts(count=3, tokens=12, length=chunk - 1))
    assert recording.sizes.tolist() == [2] * (11 + 12 + 13)
    assert engine.scheduler.chunk == chunk


def test_a_recording_comes_back_as_it_was(trace, file):
    read = read_trace(file)
    for name in ("token", "prob", "count", "child"):
        assert np.array_equal(getattr(read.recording, name), getattr(trace.recording, name)), name
    assert [a.tokens.tolist() for a in read.recording.answers] == [
        a.tokens.tolist() for a in trace.recording.answers
    ]
    assert read.recording.answers[1].task == "code"
    assert read.recording.answers[2].first == trace.recording.answers[2].first
    assert (read.eos_token_ids, read.host, read.about) == (
        (worlds.EOS,),
        trace.host,
        {"dtype": "fp32"},
    )
    ours, theirs = (
        replay(t.policy("smart"), t.recording, t.cost, 2, t.host) for t in (trace, read)
    )
    assert ours == theirs
    assert ours.tokens > ours.rounds


def test_other_and_damaged_files_are_refused_in_one_line(file, tmp_path):
    whole = file.read_bytes()
    line, _, body = whole.partition(b"\n")
    cases = {
        "not a recording": b"PK\x03\x04 some other file\n",
        "format 9": line.replace(b" 1 ", b" 9 ") + b"\n" + body,
        "damaged": whole[:-5] + b"xxxxx",
        "cut": whole[: len(whole) // 2],
    }
    for name, content in cases.items():
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ConfigError, match={"cut": "checksum"}.get(name, name)) as caught:
            read_trace(tmp_path / "other")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "missing")
    with pytest.raises(CapacityError, match="could not be written"):
        write_trace(tmp_path / "no" / "t", read_trace(file))


def test_host_costs_are_measured_and_fitted():
    assert fit_host({1: (1.0, 3.0), 5: (2.0, 8.0)}) == HostCosts(0.75, 0.25, 1.0, 1.0)
    assert fit_host({1: (1.0, 0.5)}) == HostCosts(1.0, 0.0, 0.0, 0.0)
    clock = worlds.Clock()
    plain, drafting = worlds.engine(clock), worlds.drafting_engine(clock)
    policy = drafting.policy
    # The engines' time passes in forwards only; the policy's own, which is taken off, is real, and
    # next to nothing.
    assert max(astuple(measure_host(plain, drafting, worlds.prompts(count=3, tokens=30)))) < 1e-3
    assert drafting.policy is policy
