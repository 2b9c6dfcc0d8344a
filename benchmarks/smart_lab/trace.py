"""Recordings as files: a line that names format, version and checksum, a line of JSON about it,
compressed arrays.

Needed by `bench --record`, `ablate` and `simulate --trace`.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.calibration import Calibration, Forecast
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.files import plain, whole
from smart_lab.recording import Answer, Recording
from smart_lab.replay import HostCosts

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy

MAGIC, VERSION = b"smart-recording", b"1"


@dataclass(frozen=True)
class Trace:
    """A recording and its circumstances.

    about: provenance, model, drafter, dtype, temperature. cost, host: the recording machine's
    profile, if it was measured. prior: of `smart`."""

    recording: Recording
    about: Mapping[str, Any]
    eos_token_ids: tuple[int, ...] = ()
    cost: CostModel | None = None
    host: HostCosts | None = None
    prior: Mapping[str, Any] | None = None

    def policy(self, name: str, cost: CostModel | None = None, **options: Any) -> Policy:
        """Return a policy as it would start in the recorded engine, with its own prior. Raises what
        make_policy raises."""
        offered: dict[str, Any] = {"cost": cost or self.cost, "eos_token_ids": self.eos_token_ids}
        if self.prior is not None:
            calibration = Calibration.from_state(self.prior["calibration"])
            offered["calibration"] = calibration
            offered["forecast"] = Forecast.from_state(self.prior["forecast"], calibration)
        return make_policy(name, offered, **options)


def write_trace(path: Path, trace: Trace) -> None:
    """Write the file, whole or not at all. Raises CapacityError if it cannot."""
    header = {
        "about": dict(trace.about),
        "eos_token_ids": list(trace.eos_token_ids),
        "cost": trace.cost.to_dict() if trace.cost else None,
        "host": asdict(trace.host) if trace.host else None,
        "prior": trace.prior,
        "free": trace.recording.free,
        "tasks": [answer.task for answer in trace.recording.answers],
    }
    body = json.dumps(plain(header), allow_nan=False).encode() + b"\n" + _arrays(trace.recording)
    first = b" ".join((MAGIC, VERSION, hashlib.sha256(body).hexdigest().encode())) + b"\n"
    try:
        with whole(path) as scratch:
            scratch.write_bytes(first + body)
    except OSError as error:
        raise CapacityError(f"{path} could not be written: {error.strerror}") from error


def read_trace(path: Path) -> Trace:
    """Raise ConfigError for a file that is missing, of another kind or version, or damaged."""
    try:
        first, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    words = first.split(b" ")
    if words[0] != MAGIC or len(words) != 3:
        raise ConfigError(f"{path} is not a recording: make one with smart_lab bench --record FILE")
    if words[1] != VERSION:
        raise ConfigError(
            f"{path} has format {words[1].decode(errors='replace')}, "
            f"this version reads {VERSION.decode()}"
        )
    if hashlib.sha256(body).hexdigest().encode() != words[2]:
        raise ConfigError(f"{path} is damaged: its checksum is wrong; record it again")
    try:
        return _trace(*body.split(b"\n", 1))
    except (ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{path} is not a recording that this version understands: {error}"
        ) from error


def _trace(header: bytes, arrays: bytes) -> Trace:
    state = json.loads(header)
    with np.load(io.BytesIO(arrays), allow_pickle=False) as file:
        recording = _recording({name: file[name] for name in file.files}, state)
    return Trace(
        recording,
        state["about"],
        tuple(int(token) for token in state["eos_token_ids"]),
        CostModel.from_dict(state["cost"]) if state["cost"] else None,
        HostCosts(**state["host"]) if state["host"] else None,
        state["prior"],
    )


def _arrays(recording: Recording) -> bytes:
    answers = recording.answers
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        prompt=np.array([a.prompt_length for a in answers], np.int32),
        limit=np.array([a.limit for a in answers], np.int32),
        length=np.array([len(a.tokens) for a in answers], np.int32),
        output=_small(np.concatenate([a.tokens for a in answers] or [np.zeros(0, np.int32)])),
        sizes=recording.sizes.astype(np.int32),
        count=recording.count,
        token=_small(recording.token),
        prob=recording.prob,
    )
    return buffer.getvalue()


def _recording(arrays: Mapping[str, Any], header: Mapping[str, Any]) -> Recording:
    length = arrays["length"].astype(np.int64)
    ends = np.cumsum(length)
    firsts = np.cumsum(np.maximum(length - 1, 0)) - np.maximum(length - 1, 0)
    if len(arrays["output"]) != (ends[-1] if len(ends) else 0):
        raise ValueError("answers are missing")
    answers = [
        Answer(
            int(prompt),
            int(limit),
            arrays["output"][end - size : end].astype(np.int32),
            int(first),
            str(task),
            float(header["about"].get("temperature") or 0.0),
        )
        for prompt, limit, size, end, first, task in zip(
            arrays["prompt"], arrays["limit"], length, ends, firsts, header["tasks"], strict=True
        )
    ]
    token, count, sizes = (arrays[name].astype(np.int64) for name in ("token", "count", "sizes"))
    free = bool(header.get("free"))  # files of before 2026-11-30 are a model's
    return Recording.from_flat(answers, token, arrays["prob"], count, sizes, free)


def _small(tokens: Any) -> Any:
    """Return two bytes a token where the vocabulary allows."""
    return tokens.astype(
        np.uint16 if not len(tokens) or 0 <= tokens.min() <= tokens.max() < 65536 else np.int32
    )
