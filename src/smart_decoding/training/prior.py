"""The prior that ships with a head: calibration and forecasts learned on self-written prompts, never on a benchmark."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from smart_decoding.core.policies.smart import Smart
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.llm import LLM
from smart_decoding.training.seeds import TASKS, TOPICS


def learn_prior(model: str, head: Path, prompts: int, seed: int = 0, max_tokens: int = 160) -> None:
    """Answers some prompts under `smart`, greedy and sampled, and writes head/prior.json."""
    options = {"method": "eagle", "policy": "smart", "model": str(head)}
    llm = LLM(model, speculative_config=options, max_num_seqs=4, stop_at_loops=True)
    rng = np.random.default_rng((seed, 99))
    texts = [str(rng.choice(TASKS)).format(rng.choice(TOPICS)) for _ in range(prompts)]
    tokens = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    params = [SamplingParams(temperature=0.8 * (i % 4 == 3), max_tokens=max_tokens, seed=i) for i in range(prompts)]
    for i in range(0, prompts, 1):
        llm.generate([tokens[i]], params[i])
    policy = llm.policy
    assert isinstance(policy, Smart)
    state = {"calibration": policy.calibration.state_dict(), "forecast": policy.forecast.state_dict()}
    scratch = head / "prior.partial"
    scratch.write_text(json.dumps(state) + "\n")
    os.replace(scratch, head / "prior.json")
