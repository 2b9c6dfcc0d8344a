"""SGLang's scheduler, workers and models in one process on a CPU, kernels by Triton's interpreter.

`python sglang_server.py OPTIONS REQUESTS` prints one line of JSON: the tokens of each request, and
the steps of each round. What SGLang has for GPUs only is replaced by what it has for others:
rotary embeddings by its own in torch, tree kernels by its own in Triton.
"""

from __future__ import annotations

import json
import os
import sys
import types
from array import array
from typing import Any


def on_cpu() -> None:
    """Before SGLang is imported, and once its kernels are."""
    ops = types.ModuleType("vllm._custom_ops")
    ops.rotary_embedding = None  # imported for a platform without kernels, and not called
    sys.modules["vllm"] = types.ModuleType("vllm")
    sys.modules["vllm._custom_ops"] = ops
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.kernels.ops.speculative import cache_locs, spec_tree

    spec_tree._is_xpu = True  # the branch whose kernels are Triton's
    cache_locs._is_xpu = True


def scheduler_of(options: dict[str, Any]) -> Any:
    """A scheduler with its target and, where `options` say so, its draft."""
    from sglang.srt.managers.scheduler import (
        Scheduler,
        SpawnRanks,
        publish,
    )
    from sglang.srt.server_args import PortArgs, ServerArgs

    given = {
        "device": "cpu",
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
        "mem_fraction_static": 0.2,
        "max_total_tokens": 512,
        "max_running_requests": 4,
        "context_length": 64,
        "log_level": "error",
        "attention_backend": "triton",
        "triton_attention_num_kv_splits": 2,
    }
    arguments = ServerArgs(**{**given, **options})
    ports = PortArgs.init_new(arguments)
    ranks = SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0)
    publish(arguments, role="scheduler", ranks=ranks)
    return Scheduler(arguments, ports)


def add(scheduler: Any, name: str, tokens: list[int], length: int) -> Any:
    """Queues a greedy request of so many new tokens."""
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0, max_new_tokens=length, ignore_eos=True)
    sampling.normalize(None)
    scheduler.handle_generate_request(
        TokenizedGenerateReqInput(
            rid=name,
            input_text=None,
            input_ids=array("q", tokens),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling,
            return_logprob=False,
            logprob_start_len=-1,
            top_logprobs_num=0,
            token_ids_logprob=None,
            stream=False,
        )
    )
    return scheduler.waiting_queue[-1]


def serve(scheduler: Any, requests: list[Any]) -> list[int]:
    """The scheduler's loop, without its sockets; returns the steps of each round."""
    steps: list[int] = []
    while not all(request.finished() for request in requests):
        plan = scheduler.get_next_batch_to_run(
            running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
        )
        scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch:
            decodes = batch.forward_mode.is_decode()
            scheduler.process_batch_result(batch, scheduler.run_batch(batch))
            if decodes:
                steps.append(getattr(scheduler.model_worker, "speculative_num_steps", 0))
        scheduler.last_batch = batch
    return steps


def main() -> None:
    options, prompts = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    on_cpu()
    import torch

    scheduler = scheduler_of(options)
    with torch.inference_mode():
        requests = [add(scheduler, str(i), *prompt) for i, prompt in enumerate(prompts)]
        steps = serve(scheduler, requests)
    answer = {
        "tokens": [list(request.output_ids) for request in requests],
        "steps": steps,
    }
    print(json.dumps(answer), flush=True)
    os._exit(0)  # sockets of a server that nobody listens to


if __name__ == "__main__":
    main()
