"""Never slower than plain decoding? Bad heads, adversarial prompts, a noisy neighbour, wrong
profiles: all in one go.

In every case `smart` and plain decoding of one process answer the same prompts, some rounds each in
turn. Requests come from a full queue, or as closed batches, where nothing follows a request that
ends. Printed is the paired ratio with its 95 % interval: decode-only, end to end (prompts counted),
and end to end of each task. Plain decoding beside itself is the noise. `smart` starts afresh in
each case and batch size, so the ratio includes the cost of noticing. The time to notice is measured
apart, in rounds at batch 1: until three quarters of 16 rounds are off (bad drafts), or until the
median of 16 rounds is predicted to within a quarter (wrong profiles).

Needed by the README ("Bad heads") and zen4/2026-11-28-robustness.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from smart_decoding import LLM
from smart_decoding.bench.blocks import Counts, Prompt
from smart_decoding.bench.results import decode_speedup
from smart_decoding.bench.runner import encode
from smart_decoding.cli.arguments import whole_numbers, words
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_decoding.kernels.weights import as_tensor
from smart_decoding.measuring.resume import Progress
from smart_decoding.measuring.tasks import DEFAULT_TASKS, load_task
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.registry import shipped_head
from smart_decoding.models.heads.files import load_head
from smart_decoding.training.head import TrainableHead, form_of
from smart_lab.ablations import VARIANTS
from smart_lab.cycles import AGAIN, Measurement, measure
from smart_lab.figures import SLOW
from smart_lab.options import LabOptions, loaded
from smart_lab.provenance import check_outputs, provenance
from smart_lab.summary import end_to_end_speedup

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Block
    from smart_decoding.core.batch import Round
    from smart_decoding.core.policies.smart import Smart
    from smart_decoding.engine.engine import Engine
    from smart_decoding.measuring.statistics import Ratio

WINDOW, MOST_ROUNDS = 16, 160
REQUIRED = 0.99  # of plain decoding, end to end
ARRIVALS = ("queue", "closed")
STEPS, LENGTH = 60, 128  # of training the other head
PROMPTS = 64  # of a kind: eight blocks at batch 8
LANGUAGES = (
    "Écris une courte histoire sur un phare, en français.",
    "Schreibe drei Sätze über den Regen, auf Deutsch.",
    "Escribe un poema breve sobre el mar, en español.",
    "Scrivi tre frasi sulla neve, in italiano.",
    "请用中文写一段关于茶的文字。",
    "雨の日について日本語で短い文章を書いてください。",
    "اكتب فقرة قصيرة عن القمر بالعربية.",
    "한국어로 산에 대한 짧은 글을 써 주세요.",
    "हिंदी में नदी पर एक छोटा अनुच्छेद लिखिए।",
    "Kirjoita lyhyt tarina metsästä, suomeksi.",
    "Viết một đoạn ngắn về biển bằng tiếng Việt.",
    "Napisz krótką historię o kocie, po polsku.",
)
Make = Callable[[LLM], LLM]
Observed = Sequence[tuple[bool, float]]  # of each round: drafted; seconds over predicted ones


@dataclass(frozen=True, slots=True)
class Case:
    """How `smart` is made, the prompts, the disturbance meanwhile, and the test of noticing."""

    make: Make
    prompts: Mapping[str, Sequence[Prompt]]
    disturbance: Callable[[], AbstractContextManager[None]] = nullcontext
    noticed: Callable[[Observed], int | None] | None = None


def untrained_head(folder: Path, model: str) -> None:
    """The shipped head's shapes with random weights."""
    weights = dict(load_file(_shipped(model) / "model.safetensors"))
    torch.manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith("weight") and tensor.ndim == 2:
            weights[name] = (torch.randn(tensor.shape) * 0.02).bfloat16()
    _write(folder, model, weights)


def other_head(folder: Path, model: str) -> None:
    """A head of another model: the shipped head's shapes from another seed, trained for a minute on
    reversed text, with the token embeddings in place of the target's states. It proposes wrong
    tokens with some confidence."""
    checkpoint = load_checkpoint(model)
    files = load_head(_shipped(model), checkpoint.config)
    torch.manual_seed(7)
    head = TrainableHead(form_of(files))
    embedding = as_tensor(checkpoint.weights["model.embed_tokens.weight"]).float()
    draft_ids = as_tensor(files.weights["draft_ids"])
    ids = draft_ids.long()
    place = torch.full((checkpoint.config.vocab,), -100)
    place[ids] = torch.arange(len(ids))
    output = head.lm_head.weight if head.lm_head is not None else embedding[ids]
    llm_tokens = _tokens(model, STEPS * LENGTH * 4)[::-1].copy()
    batches = torch.from_numpy(llm_tokens).long().view(STEPS, 4, LENGTH)
    optimiser = torch.optim.AdamW(head.parameters(), lr=5e-4)
    for tokens in batches:
        embedded = embedding[tokens]
        g = head.features(embedded.repeat(1, 1, len(files.aux_layers)))
        out = head(g[:, :-2], embedded[:, 1:-1], [])
        loss = torch.nn.functional.cross_entropy(
            (head.norm(out) @ output.T).flatten(0, 1), place[tokens[:, 2:]].flatten()
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    _write(folder, model, {**head.exported(), "draft_ids": draft_ids})


def _shipped(model: str) -> Path:
    source = shipped_head(model)
    if source is None:
        raise ConfigError(f"no head is shipped for {model}: take a model of `smart models`")
    return source


def _write(folder: Path, model: str, weights: Mapping[str, torch.Tensor]) -> None:
    save_file(dict(weights), folder / "model.safetensors")
    (folder / "config.json").write_text((_shipped(model) / "config.json").read_text())


def _tokens(model: str, count: int) -> NDArray[np.int64]:
    """Return tokens of the benchmark's prompts, one after the other, again and again."""
    from smart_decoding.models.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(load_checkpoint(model).tokenizer_source)
    text = [
        token
        for task in DEFAULT_TASKS
        for t in load_task(task, 60)
        for token in tokenizer.encode(t)
    ]
    return np.resize(np.array(text), count)


def adversarial(llm: LLM, options: LabOptions) -> dict[str, list[Prompt]]:
    """Random tokens, many languages, digits: drafts are bad on all of them."""
    rng = np.random.default_rng(5)
    digits = [
        f"Go on with these numbers: {', '.join(map(str, rng.integers(0, 10**6, 20)))},"
        for _ in range(PROMPTS)
    ]
    chats = {"languages": list(LANGUAGES), "digits": digits}
    found = encode(llm, chats, options)
    start = sum(map(len, found.values()))
    noise = rng.integers(0, llm.target.vocab, (PROMPTS, 60)).tolist()
    found["noise"] = [
        Prompt(start + i, "noise", tokens, options.sampling(start + i))
        for i, tokens in enumerate(noise)
    ]
    return found


@contextmanager
def busy_core() -> Iterator[None]:
    """Return another process that keeps one core busy."""
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(worker.pid, {max(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        worker.kill()
        worker.wait()


class Bench:
    """One model, its plain engine, and the cases."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        _shipped(args.model)  # before anything is loaded
        self.options = LabOptions(
            batch_sizes=args.batch_sizes, max_tokens=args.max_tokens, model=args.model
        )
        self.llm = loaded(self.options)
        self.usual = encode(
            self.llm, {task: load_task(task, PROMPTS) for task in self.options.tasks}, self.options
        )
        self.bad = adversarial(self.llm, self.options)
        self._scratch = scratch

    def case(self, name: str) -> Case:
        """Return one of CASES."""
        shipped = _head(None)
        if name == "the shipped head":
            return Case(shipped, self.usual)
        if name == "mixed kinds of text":
            return Case(shipped, {"mixed": in_turn(self.usual)})
        if name == "an untrained head":
            return Case(_head(self._made(untrained_head)), self.usual, noticed=turns_off)
        if name == "a head of another model":
            return Case(_head(self._made(other_head)), self.usual, noticed=turns_off)
        if name == "adversarial prompts":
            return Case(shipped, self.bad, noticed=turns_off)
        if name == "a noisy neighbour":
            return Case(shipped, self.usual, busy_core)
        kind = "cheap_costs" if name == "a profile far too cheap" else "expensive_costs"
        return Case(_variant(kind), self.usual, noticed=predicts)

    def _made(self, make: Callable[[Path, str], None]) -> str:
        folder = self._scratch / make.__name__
        if not folder.is_dir():
            folder.mkdir()
            make(folder, self.options.model)
        return str(folder)

    def run(self, name: str, size: int, arrivals: str, seconds: float) -> dict[str, Any]:
        """Return a row of the table: one case at one batch size, with requests that arrive in one
        of ARRIVALS' ways."""
        case = self.case(name)
        plain = [self.llm.sharing_weights(False).engine for _ in range(2)]
        engines = {"off": plain[0], AGAIN: plain[1], "smart": case.make(self.llm).engine}
        policy = cast("Smart", engines["smart"].policy)
        policy.statistics = believed = Believed(size)
        with case.disturbance():
            deadline = time.perf_counter() + seconds
            found = measure(engines, case.prompts, size, deadline, closed=arrivals == "closed")
        result = {"case": name, "batch_size": size, "arrivals": arrivals, **_figures(found)}
        result["believed"] = {**policy.stats(), "estimated_speedup": believed.speedup}
        if case.noticed is not None and size == min(self.options.batch_sizes):
            engine = case.make(self.llm).engine
            result["rounds_until_noticed"] = case.noticed(self._answering(engine, case.prompts))
        return result

    def _answering(self, engine: Engine, prompts: Mapping[str, Sequence[Prompt]]) -> Observed:
        """Return the first rounds at batch 1."""
        observed: list[tuple[bool, float]] = []
        for prompt in in_turn(prompts):
            engine.add_request(f"notice-{prompt.index}", prompt.tokens, prompt.params)
            while engine.has_unfinished_requests:
                cost = cast("Smart", engine.policy).cost
                engine.step()
                assert engine.last_round is not None
                done = engine.last_round.round
                if done.batch.size and not done.batch.prefill_rows:
                    context = float(done.batch.context[0])
                    expected = float(cost.verify_seconds(1, done.verify_rows, context))
                    observed.append((done.rule is not None, done.verify_seconds / expected))
            if len(observed) >= MOST_ROUNDS + WINDOW:
                break
        return observed


class Believed(Statistics):
    """The estimated speedup over all rounds that a block counts, where running figures fade."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._plain = self._real = 0.0

    def record(self, round: Round, predicted_seconds: float | None, plain_seconds: float) -> None:
        """Count a round."""
        super().record(round, predicted_seconds, plain_seconds)
        if round.batch.size == self._size and not round.batch.prefill_rows:
            self._plain += plain_seconds * (self._size + round.accepted) / self._size
            self._real += round.seconds

    @property
    def speedup(self) -> float:
        """Seconds of plain decoding for as many tokens, as predicted, over the real ones."""
        return self._plain / self._real if self._real else 1.0


def in_turn(prompts: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts of all tasks, one of each by turns."""
    return [prompt for of_task in zip(*prompts.values(), strict=False) for prompt in of_task]


def _slowdowns(pairs: Sequence[tuple[Block, Block]]) -> dict[str, float]:
    """Return what requests pay for others' drafts: times their plain seconds per token behind the
    first. The share at SLOW or less, the 95 % quantile, the slowest, and the mean speedup."""
    times = np.array(
        [
            answer.tpot / plain.answers[index].tpot
            for ours, plain in pairs
            for index, answer in ours.answers.items()
        ]
    )
    times = times[np.isfinite(times)]
    if not len(times):
        return {}
    return {
        "within": float((times <= SLOW).mean()),
        "quantile": float(np.quantile(times, 0.95)),
        "slowest": float(times.max()),
        "mean_speedup": float((1 / times).mean()),
    }


def _figures(found: Measurement) -> dict[str, Any]:
    """Both ratios, that of each task, plain decoding's over itself, the share of rounds off, and
    whether the answers were plain decoding's."""
    pairs = [(cycle["smart"], cycle["off"]) for cycle in found.cycles]
    tasks = {ours.task: [pair for pair in pairs if pair[0].task == ours.task] for ours, _ in pairs}
    rounds = sum(ours.counts.rounds for ours, _ in pairs)
    off = sum(ours.counts.off for ours, _ in pairs)
    return {
        "blocks": len(pairs),
        **_bounds("speedup", decode_speedup(pairs)),
        **_bounds("end_to_end", end_to_end_speedup(pairs)),
        **_bounds("noise", end_to_end_speedup(found.again)),
        "all_rounds": _all_rounds(pairs),
        "tasks": {
            task: _bounds("end_to_end", end_to_end_speedup(of)) for task, of in tasks.items()
        },
        "requests": _slowdowns(pairs),
        "requests_again": _slowdowns(found.again),
        "off_share": off / rounds if rounds else float("nan"),
        "identical": all(
            answer.tokens == plain.answers[index].tokens
            for ours, plain in pairs
            for index, answer in ours.answers.items()
        ),
    }


def _all_rounds(pairs: Sequence[tuple[Block, Block]]) -> float:
    """Return the decode-only speedup over all counted rounds. Unlike `decode_speedup` it has loops,
    as the estimate has."""
    ours, plain = (sum((pair[i].counts for pair in pairs), Counts()) for i in (0, 1))
    seconds = ours.round_seconds * plain.emitted
    return ours.emitted * plain.round_seconds / seconds if seconds else float("nan")


def _bounds(name: str, ratio: Ratio) -> dict[str, float]:
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def turns_off(observed: Observed) -> int | None:
    """Return the round from which on three quarters of a window are off; None if that never
    comes."""
    off = np.array([not drafted for drafted, _ in observed])
    return next((i for i in range(len(off) - WINDOW) if off[i : i + WINDOW].mean() >= 0.75), None)


def predicts(observed: Observed) -> int | None:
    """Return the round from which on the median of a window is predicted to within a quarter."""
    ratio = np.array([found for _, found in observed])
    return next(
        (i for i in range(len(ratio) - WINDOW) if 0.8 < np.median(ratio[i : i + WINDOW]) < 1.25),
        None,
    )


def _head(folder: str | None) -> Make:
    model = {} if folder is None else {"model": folder}
    return lambda llm: llm.sharing_weights({"method": "eagle", **model})


def _variant(name: str) -> Make:
    def make(llm: LLM) -> LLM:
        arm = llm.sharing_weights(None)
        arm.engine.policy = VARIANTS[name](cast("Smart", arm.engine.policy))
        return arm

    return make


CASES = (
    "the shipped head",
    "mixed kinds of text",
    "an untrained head",
    "a head of another model",
    "adversarial prompts",
    "a noisy neighbour",
    "a profile far too cheap",
    "a profile far too expensive",
)


def line_of(row: Mapping[str, Any]) -> str:
    """Return a row as a line of text. One block has no interval, so it is not judged."""
    where = f"{row['case']:26} {row['arrivals']:6} batch {row['batch_size']:2}"
    few = f"too few blocks to judge ({row['blocks']}): raise --seconds"
    if not row["blocks"]:
        return f"{where}, {few}"
    tasks = " ".join(f"{task} {of['end_to_end']:.3f}" for task, of in row["tasks"].items())
    parts = [
        where,
        f"decode {_range(row, 'speedup')}",
        f"end to end {_range(row, 'end_to_end')}: {tasks}",
        f"noise {row['noise']:.3f}",
        f"{row['blocks']} blocks",
        f"{row['off_share']:.0%} of rounds off",
    ]
    for kind, requests in (("requests", row["requests"]), ("plain again", row["requests_again"])):
        if requests:
            parts.append(
                f"{kind}: {requests['within']:.0%} within {SLOW}, 95 % {requests['quantile']:.2f}, "
                f"slowest {requests['slowest']:.2f}"
            )
    believed = row["believed"]
    ratios = [
        f"{key.removesuffix('_predicted_seconds')} {value:.2f}"
        for key, value in believed.items()
        if key.endswith("_predicted_seconds")
    ]
    parts.append(f"estimated {believed['estimated_speedup']:.3f} for {row['all_rounds']:.3f}")
    parts.append(f"predicted / real seconds: {', '.join(ratios)}")
    if "rounds_until_noticed" in row:
        parts.append(f"noticed after {row['rounds_until_noticed']} rounds")
    verdict = "ok" if row["end_to_end"] >= REQUIRED else f"BELOW {REQUIRED}"
    if row["blocks"] < 2:
        verdict = few
    return f"{', '.join(parts)}  {verdict}{'' if row['identical'] else ', OTHER TOKENS'}"


def _range(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f}-{row[f'{name}_high']:.3f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurement."""
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="with a head of its own (smollm2-135m)")
    add("--seconds", type=float, default=28.0, help="of each case and batch size")
    add("--max-tokens", type=int, default=96, help="of each answer (96)")
    add("--batch-sizes", type=whole_numbers, default=(1, 8), metavar="1,8")
    add("--arrivals", type=words, default=("queue",), metavar="A,B", help="of: queue, closed")
    add("--cases", type=words, default=CASES, metavar="A,B", help=f"of: {', '.join(CASES)}")
    limit = "seconds; what is missing then is left out"
    add("--time-limit", type=float, default=480.0, help=limit)
    add("--resume", type=Path, help="keep what is measured there, and go on from it")
    add("--json", type=Path)


def command_of(args: argparse.Namespace) -> str:
    """Return the command line of this run."""
    command = ["python", "-m", "smart_lab", "robustness", "--model", args.model]
    command += ["--seconds", f"{args.seconds:g}", "--max-tokens", str(args.max_tokens)]
    command += ["--batch-sizes", ",".join(map(str, args.batch_sizes))]
    command += ["--arrivals", ",".join(args.arrivals), "--cases", ",".join(args.cases)]
    command += ["--time-limit", f"{args.time_limit:g}"]
    return shlex.join(command)


def main(args: argparse.Namespace) -> int:
    """Print a row for each case, way of arriving and batch size. Raises ConfigError for an unknown
    case or way."""
    for kind, given, known in (
        ("case", args.cases, CASES),
        ("way of arriving", args.arrivals, ARRIVALS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"unknown {kind} {unknown[0]!r}; known: {', '.join(known)}")
    check_outputs((args.json, args.resume))
    stop = time.perf_counter() + args.time_limit
    names = ("model", "seconds", "max_tokens", "batch_sizes")
    progress = Progress(args.resume, {name: getattr(args, name) for name in names})
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        for name, arrivals, size in itertools.product(args.cases, args.arrivals, args.batch_sizes):
            unit = f"{name}, {arrivals}, batch {size}"
            if not progress.units(unit):
                if time.perf_counter() + args.seconds > stop:
                    print(f"{unit}: left out, the time limit came first; go on with --resume")
                    continue
                progress.add(unit, bench.run(name, size, arrivals, args.seconds))
            rows.append(progress.units(unit)[0])
            print(line_of(rows[-1]), flush=True)
        origin = provenance(command_of(args), 0, bench.llm.provenance, "as each case says")
    if args.json is not None:
        write_json(args.json, {"provenance": origin, "robustness": rows})
    return 0
