"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md.

A round is `predict` (what each way to spend it would bring), `choose` (the best one, or one to
explore), and `learn` (from what happened). `State` is all that lasts between rounds.
"""

from smart_decoding.core.policies.smart.policy import Choice, Smart, choose
from smart_decoding.core.policies.smart.predict import Prediction, Shape, predict
from smart_decoding.core.policies.smart.state import Mode, State

__all__ = ["Choice", "Mode", "Prediction", "Shape", "Smart", "State", "choose", "predict"]
