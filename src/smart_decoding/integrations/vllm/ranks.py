"""The shortcuts on several ranks, whose processes are not the scheduler's.

Two marks travel on what is pickled anyway. There: a step's K is a `Length`, and to unpickle one
installs the shortcuts, in every rank before the step runs. Back: the rank that answers says in each
output whether a draft model has run through them. Before that the scheduler sends no DISABLED, as
another model runner would not understand it. Where nothing is pickled, the one process knows by
itself.
"""

from __future__ import annotations

from typing import Any

from smart_decoding.integrations.vllm.shortcuts import drafter_seen, install, replace

MARK = "_smart_drafter_seen"
_nothing = [False]  # whether the step that was scheduled last drafts nothing


class Length(int):
    """K on its way to other processes, where it arrives as a plain int."""

    def __reduce__(self) -> Any:
        return arrive, (int(self),)


def same_machine(backend: Any, nodes: Any) -> bool:
    """Whether ranks are processes of this machine, with this one's Python.

    Elsewhere a `Length` might not be known, and its step would fail."""
    return bool(backend == "mp" and nodes == 1)


def arrive(length: int) -> int:
    """What a `Length` is unpickled by."""
    from vllm.v1.outputs import ModelRunnerOutput

    install()
    mark(ModelRunnerOutput)
    return length


def mark(kind: Any) -> None:
    """From now on objects of this class tell, when pickled, whether a draft model has run."""
    kind.__getstate__ = _state


def _state(output: Any) -> dict[str, Any]:
    return {**vars(output), MARK: drafter_seen()}


def marked(output: Any) -> bool:
    """Whether the process that `output` came from has run a draft model through the shortcuts."""
    return bool(getattr(output, MARK, False))


def drafts_nothing(nothing: bool) -> None:
    """Said of each step when it is scheduled.

    One that drafts nothing needs no call to the ranks for its drafts."""
    _nothing[:] = [nothing]


def shorten_fetching() -> None:
    """Leaves that call out; once per process.

    Only for where a step ends before the next one is scheduled."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    def take_draft_token_ids(original: Any, self: Any) -> Any:
        nothing = _nothing[0]
        drafts_nothing(False)
        return None if nothing else original(self)

    replace(MultiprocExecutor, "take_draft_token_ids", take_draft_token_ids)
