"""The prior that ships with a head: calibration and forecasts, learned on self-written prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tqdm import tqdm

from smart_decoding.core.calibration import Calibration, Forecast
from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.policies.eagle2 import Eagle2
from smart_decoding.core.policies.smart import Smart
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.files import whole
from smart_decoding.llm import LLM

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.multimodal.prompts import Prompt
    from smart_decoding.training.generate import PictureTurn

ANSWER_TOKENS = 100
PICTURES = 55  # first number of the pictures' seeds


class Exploring(StatelessPolicy):
    """A policy of wide trees at any cost, so that `smart` learns of all depths and confidences."""

    name = "exploring"

    def __init__(self, learner: Smart) -> None:
        wide = Eagle2(depth=3, top_k=8, total_tokens=12)
        self.plan = wide.plan
        self._learner = learner

    def observe(self, round: Round) -> None:
        """Pass the round on to the learner."""
        self._learner.observe(round)


Conversation: TypeAlias = Sequence[Mapping[str, Any]]


def picture_turns(turn: PictureTurn, count: int) -> list[Conversation]:
    """Return conversations about pictures, drawn from seeds that no training uses."""
    return [turn(np.random.default_rng((PICTURES, i))) for i in range(count)]


def learn_prior(
    model: str,
    head: Path,
    prompts: Sequence[Sequence[int] | Conversation],
    trust_pickle: bool = False,
    allow_slow: bool = False,
) -> None:
    """Answer `prompts` (token ids or messages) with wide trees; write head/prior.json. Without
    prompts the file is removed.

    Three of four answers are greedy, one is sampled."""
    options = {"method": "eagle", "policy": "smart", "model": str(head)}
    if not prompts:
        (head / "prior.json").unlink(missing_ok=True)
        return
    llm = LLM(
        model,
        generation_config="vllm",
        speculative_config=options,
        max_num_seqs=1,
        stop_at_loops=True,
        trust_pickle=trust_pickle,
        allow_slow=allow_slow,
    )
    policy = llm.policy
    assert isinstance(policy, Smart)
    calibration = Calibration()  # in place of the prior that the head has
    policy.state.calibration, policy.state.forecast = calibration, Forecast(calibration)
    llm.engine.policy = Exploring(policy)
    for i, prompt in enumerate(tqdm(prompts, desc="learning the prior")):
        ready: Prompt = llm.chat_prompt(prompt) if isinstance(prompt[0], Mapping) else list(prompt)
        temperature = 0.8 if i % 4 == 3 else 0.0
        params = SamplingParams(temperature=temperature, max_tokens=ANSWER_TOKENS, seed=i)
        llm.generate(ready, params, use_tqdm=False)
    state = {
        "calibration": policy.state.calibration.state_dict(),
        "forecast": policy.state.forecast.state_dict(),
    }
    with whole(head / "prior.json") as path:
        path.write_text(json.dumps(state) + "\n")
