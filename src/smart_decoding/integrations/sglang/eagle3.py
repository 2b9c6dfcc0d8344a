"""`SMART_EAGLE3` for SGLang: EAGLE-3 whose requests verify as many nodes as pay, each its own.

SGLang drafts and builds its trees of one size, and walks and commits them, as for EAGLE3. Between
the two the nodes that pay are chosen over the whole batch; the target's forward has only them.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.speculative.eagle_info import EagleVerifyInput
from sglang.srt.speculative.eagle_worker_common import run_eagle_verify
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.speculative.ragged_verify import RaggedVerifyLayout

from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang.costs import read_costs
from smart_decoding.integrations.sglang.pooled import PooledChoice, RowCosts
from smart_decoding.integrations.sglang.ragged import (
    KeptScores,
    Rows,
    mask_starts,
    packed_mask,
    pruned,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


DRAFTED = "sglang.srt.speculative.eagle_worker_v2.organize_draft_results"
LAID_OUT = "sglang.srt.layers.attention.triton_backend.TritonAttnBackend.init_forward_metadata"


class PackedTarget:
    """The target's worker, whose verification runs the kept rows only."""

    def __init__(self, worker: Any, rows: Rows) -> None:
        self._worker = worker
        self._rows = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def forward_batch_generation(self, batch: Any, forward_batch: Any, **options: Any) -> Any:
        """SGLang's, with logits and hidden states in the places of unpruned trees."""
        packed = self._packed(forward_batch)
        result = self._worker.forward_batch_generation(batch, forward_batch=packed, **options)
        output = result.logits_output
        output.next_token_logits = self._rows.spread(output.next_token_logits)
        if output.hidden_states is not None:
            output.hidden_states = self._rows.spread(output.hidden_states)
        return result

    def _packed(self, forward_batch: Any) -> Any:
        places, lengths = self._rows.places, self._rows.lengths
        packed = copy.copy(forward_batch)
        for name in ("input_ids", "positions", "out_cache_loc"):
            setattr(packed, name, getattr(forward_batch, name)[places])
        packed.num_token_non_padded_cpu = len(places)
        if packed.num_token_non_padded is not None:
            packed.num_token_non_padded = torch.full_like(packed.num_token_non_padded, len(places))
        tree = packed.spec_info = copy.copy(forward_batch.spec_info)
        tree.draft_token = packed.input_ids
        tree.positions = packed.positions
        tree.ragged_verify_layout = RaggedVerifyLayout.from_verify_lens(
            verify_lens_cpu=lengths, device=places.device, grid=[len(places)]
        )
        if max(lengths) > 1:
            tree.custom_mask = packed_mask(tree.custom_mask, forward_batch.seq_lens, self._rows)
        else:  # roots alone
            tree.custom_mask = None
        return packed


def lay_out(_: None, backend: Any, forward_batch: Any) -> None:
    """After the Triton backend has laid out rows of one number: those of a packed forward.

    All else that it lays out is the same for rows of any number."""
    tree = forward_batch.spec_info
    layout = getattr(tree, "ragged_verify_layout", None)
    if layout is None or not forward_batch.forward_mode.is_target_verify():
        return
    metadata = backend.forward_metadata
    metadata.qo_indptr = layout.qo_indptr_device
    metadata.max_extend_len = max(layout.verify_lens_cpu)
    metadata.mask_indptr = mask_starts(forward_batch.seq_lens, layout.verify_lens)


class SmartEagle3Worker(EAGLEWorkerV2):  # type: ignore[misc]
    """SGLang's worker for EAGLE-3, with a choice between drafting and verifying."""

    def __init__(self, server_args: Any, *others: Any, **options: Any) -> None:
        super().__init__(server_args, *others, **options)
        costs = RowCosts(read_costs(), self.speculative_num_steps)
        self.choice = PooledChoice(costs, self.speculative_num_draft_tokens - 1)
        self._scores = KeptScores()
        HookRegistry.register(DRAFTED, self._scores, HookType.AROUND)
        HookRegistry.register(LAID_OUT, lay_out, HookType.AFTER)
        HookRegistry.apply_hooks()

    def init_cuda_graphs(self) -> None:
        """SGLang's last step before it serves; refuses a target of a kind that was never tried."""
        check_target(self.target_worker.model_runner)
        super().init_cuda_graphs()

    def forward_batch_generation(self, batch: Any, *others: Any, **options: Any) -> Any:
        """SGLang's; where drafting does not pay, the roots alone are verified."""
        extends = batch.forward_mode.is_extend() or batch.is_extend_in_batch
        self._drafted = True
        if not extends and not batch.forward_mode.is_idle():
            self._drafted = self.choice.drafts(len(batch.seq_lens))
            if not self._drafted:
                batch.spec_info = self._roots(batch)
        return super().forward_batch_generation(batch, *others, **options)

    def verify(self, batch: Any, pp_proxy_tensors: Any = None, grammar_barrier: Any = None) -> Any:
        """SGLang's, of the nodes that pay."""
        tree = batch.spec_info
        target = self.target_worker
        if not batch.forward_mode.is_idle():
            keep = np.zeros((len(batch.seq_lens), tree.draft_token_num - 1), np.bool_)
            if self._drafted:
                keep = self.choice.choose(self._scores.take())
            rows = Rows.of(keep, tree.draft_token.device)
            tree.retrieve_next_token, tree.retrieve_next_sibling = pruned(
                tree.retrieve_next_token, tree.retrieve_next_sibling, rows, self.topk
            )
            target = PackedTarget(target, rows)
        return run_eagle_verify(
            batch,
            pp_proxy_tensors=pp_proxy_tensors,
            target_worker=target,
            req_to_token_pool=self.req_to_token_pool,
            token_to_kv_pool_allocator=self.token_to_kv_pool_allocator,
            plan_stream=self.plan_stream,
            plan_stream_ctx=self.plan_stream_ctx,
            topk=self.topk,
            num_draft_tokens=self.speculative_num_draft_tokens,
            device=self.device,
            metadata_ready_pre_pad=False,
            finalize_tree_path=True,
            grammar_barrier=grammar_barrier,
        )

    def on_verify_complete_cpu(
        self, num_correct_drafts_per_req: Sequence[int], batch_size: int = 0, **_: Any
    ) -> None:
        """Counts what was accepted. Newer versions say more."""
        self.choice.observe(num_correct_drafts_per_req)

    def _roots(self, batch: Any) -> EagleVerifyInput:
        """Unpruned trees with nothing below their roots."""
        width, size = self.speculative_num_draft_tokens, len(batch.seq_lens)
        device = batch.seq_lens.device
        context = batch.seq_lens.to(torch.int64)
        tokens = torch.zeros((size, width), dtype=torch.int64, device=device)
        tokens[:, 0] = batch.spec_info.bonus_tokens
        none = torch.full((size, width), -1, dtype=torch.int64, device=device)
        return EagleVerifyInput(
            draft_token=tokens.flatten(),
            custom_mask=torch.ones(0, dtype=torch.bool, device=device),
            positions=context.repeat_interleave(width),
            retrieve_index=torch.arange(size * width, device=device).view(size, width),
            retrieve_next_token=none,
            retrieve_next_sibling=none.clone(),
            retrieve_cum_len=None,
            spec_steps=self.speculative_num_steps,
            topk=self.topk,
            draft_token_num=width,
            capture_hidden_mode=None,
            seq_lens_sum=None,
            seq_lens_cpu=None,
        )


def check_target(runner: Any) -> None:
    """Raises ConfigError if the target is of a kind that was never tried."""
    backend = runner.attn_backend
    # Backends that hold others are of other types: of recurrent layers, and of two batches.
    wrong = {
        "attention of other kinds": type(backend) is not TritonAttnBackend,
        "multi-head latent attention": runner.use_mla_backend,
        "sliding windows": (getattr(backend, "sliding_window_size", None) or 0) > 0,
        "multimodal positions": runner.model_config.model_is_mrope,
    }
    found = [name for name, here in wrong.items() if here]
    if found:
        raise ConfigError(f"SMART_EAGLE3 does not support {', '.join(found)}: use EAGLE3")
