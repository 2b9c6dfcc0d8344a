"""`SMART_EAGLE3` among SGLang's algorithms: treated as EAGLE3 by all but its worker and its
arguments."""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang.costs import read_costs
from smart_decoding.integrations.sglang.pooled import RowCosts

NAME = "SMART_EAGLE3"
_OWN = {"create_worker", "handle_server_args", "from_string", "register"}
_OWN |= {"resolve_max_speculative_num_draft_tokens", "get_platform_worker_cls"}

# Options that were never tried with rows of several numbers: of each, the values that are refused.
REFUSED = {
    "speculative_adaptive": "the nodes are chosen by SMART_EAGLE3 itself",
    "speculative_use_rejection_sampling": "drafts are not sampled",
    "enable_dp_attention": "ranks would have batches of several sizes",
    "enable_two_batch_overlap": "halves of a batch would have several sizes",
    "enable_multi_layer_eagle": "only one layer drafts",
    "enable_lora": "adapters are laid out for rows of one number",
    "enable_mixed_chunk": "prompts would be among the rows",
    "watermark_config": "it reads unpruned trees",
}


def like_eagle3(name: str) -> Any:
    """A method of EAGLE3's, for an algorithm of another name."""

    def method(_: Any, *args: Any, **options: Any) -> Any:
        return getattr(SpeculativeAlgorithm.EAGLE3, name)(*args, **options)

    return method


class SmartEagle3(CustomSpecAlgo):  # type: ignore[misc]
    """EAGLE3 to SGLang, whatever it asks."""

    def handle_server_args(self, server_args: Any) -> None:
        """Sets what SMART_EAGLE3 needs, and refuses what it cannot run with: ConfigError."""
        check(server_args)
        server_args.disable_overlap_schedule = True  # the choice waits for the drafts
        if server_args.max_running_requests is None:
            server_args.max_running_requests = 48  # as for EAGLE3


for _name, _member in vars(SpeculativeAlgorithm).items():
    if callable(_member) and not _name.startswith("_") and _name not in _OWN:
        setattr(SmartEagle3, _name, like_eagle3(_name))


def check(server_args: Any) -> None:
    """Raises ConfigError, before a model is loaded, if these arguments were never tried."""
    for option, why in REFUSED.items():
        if getattr(server_args, option, False):
            raise ConfigError(f"{NAME} does not support --{option.replace('_', '-')}: {why}")
    for option in ("pp_size", "dp_size"):
        if getattr(server_args, option, 1) not in (None, 1):
            raise ConfigError(f"{NAME} does not support --{option.replace('_', '-')} above 1")
    backends = {server_args.attention_backend, server_args.decode_attention_backend}
    backends |= {server_args.prefill_attention_backend}
    if backends - {None} != {"triton"}:
        raise ConfigError(f"{NAME} needs --attention-backend triton")
    graphs_off = (
        server_args.disable_cuda_graph
        or server_args.disable_decode_cuda_graph
        or server_args.cuda_graph_backend_decode == "disabled"
    )
    if not graphs_off:
        raise ConfigError(
            f"{NAME} was never tried in CUDA graphs: give --cuda-graph-backend-decode disabled"
        )
    steps = server_args.speculative_num_steps
    topk = server_args.speculative_eagle_topk
    tokens = server_args.speculative_num_draft_tokens
    if not (steps and topk and tokens and server_args.speculative_draft_model_path):
        raise ConfigError(
            f"{NAME} needs --speculative-draft-model-path, --speculative-num-steps, "
            "--speculative-eagle-topk and --speculative-num-draft-tokens"
        )
    if topk < 2:
        raise ConfigError(f"{NAME} drafts trees: give --speculative-eagle-topk 2 or more")
    drafted = topk + (steps - 1) * topk * topk
    if not steps < tokens <= drafted + 1:
        raise ConfigError(
            f"{steps} steps with --speculative-eagle-topk {topk} have "
            f"{steps + 1} to {drafted + 1} --speculative-num-draft-tokens"
        )
    RowCosts(read_costs(), steps)


def worker(_: Any) -> type:
    """SMART_EAGLE3's worker; importing it needs SGLang's kernels."""
    from smart_decoding.integrations.sglang.eagle3 import SmartEagle3Worker

    return SmartEagle3Worker
