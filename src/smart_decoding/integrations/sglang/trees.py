"""Extensions of SGLang's adaptive mode, which is made for chains, to switch between trees.

A tier is a number of steps with a number of nodes. SGLang keeps its runtime states by steps, so
each number of steps has one tier. Within a tier SGLang expands and prunes its tree by itself: it
keeps the `nodes` most probable drafts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang.costs import read_costs
from smart_decoding.integrations.sglang.seams import RECORD

if TYPE_CHECKING:
    from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

OURS = "smart_decoding"  # source of our decisions in SGLang's record


def unsupported_reason(original: Callable[[Any], str | None], server_args: Any) -> str | None:
    """Return SGLang's reason against adaptive speculation, except topk > 1.

    Page sizes above 1 reserve for one tier only."""
    view = resolving_view(server_args)
    if view.speculative_eagle_topk not in (None, 1) and view.page_size not in (None, 1):
        return f"page_size={view.page_size} (trees of several sizes need 1)"
    chain = copy.copy(server_args)
    # A copy of the record: the caller's must not change.
    setattr(chain, RECORD, list(getattr(server_args, RECORD, None) or []))
    declare_resolution(chain, OURS, speculative_eagle_topk=1)
    return original(chain)


def set_first_tier(_: None, server_args: Any) -> None:
    """Set the tree to start with, where SGLang has just set a chain."""
    view = resolving_view(server_args)
    costs = read_costs()
    topk = view.speculative_eagle_topk
    for steps, nodes in costs.nodes.items():
        drafted = topk + (steps - 1) * topk * topk
        if not steps <= nodes <= drafted:
            raise ConfigError(
                f"{steps} steps with --speculative-eagle-topk {topk} have "
                f"{steps} to {drafted} nodes"
            )
    declare_resolution(
        server_args, OURS, speculative_num_draft_tokens=costs.tokens(view.speculative_num_steps)
    )


def widest(result: int | None, _: object, server_args: Any) -> int | None:
    """Return slots that a request may need in a step of any tier, as the tier is chosen later."""
    view = resolving_view(server_args)
    costs = read_costs()
    if result is None or not view.speculative_adaptive:
        return result
    drafting = max(costs.nodes) * int(view.speculative_eagle_topk)
    return max(drafting, *(costs.tokens(steps) for steps in costs.nodes))


class _Worker:
    """A worker whose runtime states have the tokens of their tier."""

    def __init__(self, worker: Any, tokens: Callable[[int], int]) -> None:
        self._worker = worker
        self._tokens = tokens

    def build_adaptive_runtime_state(
        self,
        speculative_num_steps: int,
        speculative_num_draft_tokens: int,
        cuda_graph_bs: list[int] | None = None,
    ) -> Any:
        """Return the worker's, with the tokens of the tier instead of a chain's."""
        return self._worker.build_adaptive_runtime_state(
            speculative_num_steps=speculative_num_steps,
            speculative_num_draft_tokens=self._tokens(speculative_num_steps),
            cuda_graph_bs=cuda_graph_bs,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)


class TreeController(AdaptiveController):  # type: ignore[misc]
    """SGLang's controller, over tiers."""

    def __init__(self, worker: Any, policy: SmartSpecPolicy) -> None:
        super().__init__(_Worker(worker, policy.costs.tokens), policy)


_PARAMS = "sglang.srt.speculative.adaptive_spec_params"
_ARGUMENTS = "sglang.srt.arg_groups.speculative_hook"
_ALGORITHM = "sglang.srt.speculative.spec_info.SpeculativeAlgorithm"
HOOKS = (  # target, hook, kind
    (f"{_PARAMS}.adaptive_unsupported_reason", unsupported_reason, "AROUND"),
    (f"{_ARGUMENTS}._init_adaptive_speculative_params", set_first_tier, "AFTER"),
    (f"{_ALGORITHM}.resolve_max_speculative_num_draft_tokens", widest, "AFTER"),
    ("sglang.srt.speculative.adaptive_runtime_state.AdaptiveController", TreeController, "REPLACE"),
)
