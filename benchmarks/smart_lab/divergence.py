"""`python -m smart_lab divergence`: how often bf16 output differs under speculation, and whether
that is a near-tie.

A forward of many rows may round its logits differently from a forward of one. Where the two most
likely tokens lie closer than this rounding, the argmax can flip; from there on the answers differ.
How large the rounding is, is measured in the same run: at every position before a difference both
ways of decoding score the same context, so the change of the gap between the two most likely tokens
is rounding alone. A first difference is a near-tie if the tokens' gap in plain decoding is at most
the largest such change. The project's CPU kernels give equal bits for any number of rows: there, no
difference at all is expected.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.data import load_task
from smart_decoding.cli.arguments import add_allow_slow
from smart_decoding.core.tree_picture import quoted
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput, Logprob
    from smart_decoding.llm import LLM

SPECULATION = {"policy": "eagle2"}  # 60 nodes a round: far more rows than plain decoding
_TOP = 8  # log probabilities kept per position


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position at which two answers differ. gap: nats by which plain decoding's token
    beat the other in plain decoding; spec_gap: by which the other won under speculation; inf where
    a token is not among the top 8."""

    prompt: int
    position: int
    plain: int
    other: int
    gap: float
    spec_gap: float


@dataclass(slots=True)
class Report:
    """changes, gaps: per position that both scored in the same context, the change of the top-two
    gap, and that gap."""

    answers: int = 0
    tokens: int = 0
    verified: int = 0
    changes: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def rounding(self) -> float:
        """Nats: the largest change of a top-two gap that rounding alone has made."""
        return max(self.changes, default=0.0)

    def is_near_tie(self, difference: Difference) -> bool:
        return difference.gap <= self.rounding

    @property
    def passed(self) -> bool:
        """Whether speculation was at work and every difference is a near-tie."""
        return self.verified > 0 and all(self.is_near_tie(d) for d in self.differences)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m smart_lab divergence`."""
    parser.add_argument(
        "--prompts", type=int, default=20, help="how many of the general prompts (20)"
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer (128)")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_allow_slow(parser)


def main(args: argparse.Namespace) -> int:
    """Prints the report. Exit code 1 if nothing was speculated or a difference is no near-tie."""
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, logprobs=_TOP)
    prompts = load_task("general", args.prompts)
    if len(prompts) < args.prompts:
        raise ConfigError(
            f"there are {len(prompts)} general prompts: --prompts {args.prompts} is too many"
        )
    from smart_decoding.llm import LLM

    common: dict[str, Any] = {"dtype": "bfloat16", "device": args.device, "max_num_seqs": 1}
    common["allow_slow"] = args.allow_slow
    plain = LLM(args.model, speculative_config=False, **common)
    spec = LLM(args.model, speculative_config=SPECULATION, **common)
    report = compare(plain, spec, prompts, params)
    print(render(report, plain))
    return 0 if report.passed else 1


def compare(plain: LLM, spec: LLM, prompts: Sequence[str], params: SamplingParams) -> Report:
    """Answers every prompt both ways."""
    report = Report()
    for i, prompt in enumerate(tqdm(prompts, desc="prompts", unit="prompt", leave=False)):
        message = [[{"role": "user", "content": prompt}]]
        first, second = (llm.chat(message, params)[0].outputs[0] for llm in (plain, spec))
        record(report, i, first, second)
    return report


def record(report: Report, prompt: int, plain: CompletionOutput, spec: CompletionOutput) -> None:
    """Adds one pair of answers to the report."""
    ours, theirs = plain.token_ids, spec.token_ids
    same = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    report.answers += 1
    report.tokens += len(ours)
    report.verified += spec.metrics.verified
    at, under = plain.logprobs or [], spec.logprobs or []
    for position in range(same):
        top, second = sorted(at[position], key=lambda token: at[position][token].rank or 0)[:2]
        gap, other = _gap(at[position], top, second), _gap(under[position], top, second)
        report.gaps.append(gap)
        if np.isfinite(other):
            report.changes.append(abs(other - gap))
    if same < min(len(ours), len(theirs)):
        a, b = ours[same], theirs[same]
        report.differences.append(
            Difference(prompt, same, a, b, _gap(at[same], a, b), _gap(under[same], b, a))
        )


def render(report: Report, llm: LLM) -> str:
    """The report in words."""
    count = len(report.differences)
    lines = [
        f"model: {llm.provenance.get('model')}, weights: {llm.provenance.get('weights')}, bf16",
        f"{report.answers} answers, {report.tokens} tokens, "
        f"{report.verified} drafted rows verified",
        f"answers that differ under speculation: {count} of {report.answers}",
        f"rounding: the top-two gap changed by at most {report.rounding:.4f} nats, "
        f"{_share(report.changes, 0.0)} of positions not at all; "
        f"median gap {np.median(report.gaps or [0.0]):.2f} nats",
    ]
    for d in report.differences:
        tokens = [quoted(llm.tokenizer.decode([token], False)) for token in (d.plain, d.other)]
        verdict = "near-tie" if report.is_near_tie(d) else "NOT a near-tie: please report this"
        lines.append(
            f"  prompt {d.prompt}, token {d.position}: plain {tokens[0]}, speculative {tokens[1]}; "
            f"gap {d.gap:.4f} nats plain, {d.spec_gap:.4f} speculative "
            f"({_share(report.gaps, d.gap)} of positions as close): {verdict}"
        )
    if not report.verified:
        lines.append(
            "nothing was tested: no drafted row was verified (is there a drafter for this model?)"
        )
    return "\n".join(lines)


def _gap(scores: Mapping[int, Logprob], winner: int, loser: int) -> float:
    """log p(winner) - log p(loser), which is the difference of their logits; inf if either is not
    recorded."""
    if winner not in scores or loser not in scores:
        return float("inf")
    return scores[winner].logprob - scores[loser].logprob


def _share(values: Sequence[float], limit: float) -> str:
    return f"{np.mean(np.asarray(values) <= limit):.1%}" if values else "none"
