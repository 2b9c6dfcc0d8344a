"""`smart tune`: starts the user's own engine in many ways, and says which one is the fastest."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding import __version__
from smart_decoding.cli.arguments import refuse_windows, whole_numbers
from smart_decoding.cli.prompts import read_prompts
from smart_decoding.errors import ConfigError, DownloadError, ModelError
from smart_decoding.files import write_json
from smart_decoding.integrations.tuning import report, sglang_lines
from smart_decoding.integrations.tuning.llama_cpp import LlamaCpp, server_at
from smart_decoding.integrations.tuning.processes import ending_with_us, time_limit
from smart_decoding.integrations.tuning.search import Prompts, Search
from smart_decoding.integrations.tuning.sglang import Sglang, write_costs
from smart_decoding.integrations.tuning.vllm import Vllm
from smart_decoding.measuring.machine import machine
from smart_decoding.measuring.resume import Progress
from smart_decoding.measuring.tasks import load_task
from smart_decoding.options import mapping

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.engines import Tunable
    from smart_decoding.integrations.tuning.found import LoadResult

INTERRUPTED = 130
TASKS = ("code", "maths", "general")
NGRAM = '{"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 2}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the engines, each with its options."""
    engines = parser.add_subparsers(
        dest="engine", metavar="llama.cpp | vllm | sglang", required=True
    )
    _add_llama_cpp(engines.add_parser("llama.cpp", help="your llama-server and a GGUF file"))
    _add_vllm(engines.add_parser("vllm", help="vLLM, in whose environment this runs"))
    _add_sglang(engines.add_parser("sglang", help="SGLang, in whose environment this runs"))


def _add_llama_cpp(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-m", "--model", type=Path, required=True, metavar="FILE", help="the model, a GGUF file")
    draft = "a smaller model of the same vocabulary, or a draft head (none: n-grams alone)"
    add("--draft", "-md", type=Path, metavar="FILE", help=draft)
    add("--server", type=Path, metavar="PATH", help="llama-server, or its folder (from PATH)")
    more = "further options of llama-server, in quotes, such as '-ngl 99 -ctk q8_0' (none)"
    add("--server-args", type=shlex.split, default=[], metavar="WORDS", help=more)
    _add_common(parser, "slots", (1, 4, 8), "smart-tune.ini", 64)


def _add_vllm(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="as vLLM takes it: a hub id or a folder")
    speculative = f"vLLM's, without lengths ({NGRAM})"
    default = json.loads(NGRAM)
    add("--speculative-config", type=mapping, default=default, metavar="JSON", help=speculative)
    more = 'other arguments of vllm.LLM, such as {"tensor_parallel_size": 2} (none)'
    add("--engine-args", type=mapping, default={}, metavar="JSON", help=more)
    add("--lengths", type=whole_numbers, default=(1, 2, 4), help="draft lengths to try (1,2,4)")
    context = (
        "mean context of your requests while they are answered, for the profile of vLLM's "
        "adaptive verification (prompt and half the answer of what is measured)"
    )
    add("--context", type=int, metavar="TOKENS", help=context)
    check = "then compare vLLM with the schedule with plain vLLM, in the time that is left"
    add("--check", action="store_true", help=check)
    _add_common(parser, "batch-sizes", (1, 2, 4, 8, 16), "vllm-speculative.json", 128)


def _add_sglang(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", nargs="?", help="as SGLang takes it: a hub id or a folder")
    add("--speculative-algorithm", default="EAGLE3", metavar="NAME", help="SGLang's (EAGLE3)")
    add("--speculative-draft-model-path", metavar="PATH", help="SGLang's option: the draft head")
    topk = "SGLang's option; above 1 for trees, with --nodes (1)"
    add("--speculative-eagle-topk", type=int, default=1, metavar="K", help=topk)
    add("--steps", type=whole_numbers, default=(1, 3, 5), help="draft steps to try (1,3,5)")
    nodes = "for trees: nodes after each number of steps, without the root (none: chains)"
    add("--nodes", default="", metavar="STEPS=NODES,...", help=nodes)
    more = "further options of SGLang's server, in quotes, such as '--tp 2' (none)"
    add("--server-args", type=shlex.split, default=[], metavar="WORDS", help=more)
    lines = (
        "start no server: read the --output-file of sglang.bench_serving, measured with STEPS "
        "draft steps (0: no speculation), a line for each load"
    )
    add("--bench-serving", nargs="+", metavar="STEPS=FILE", help=lines)
    _add_common(parser, "max-concurrency", (1, 4, 16), "costs.json", 128)


def _add_common(
    parser: argparse.ArgumentParser, load: str, loads: tuple[int, ...], output: str, tokens: int
) -> None:
    add = parser.add_argument
    shown = ",".join(map(str, loads))
    help_ = f"requests at once ({shown})"
    add(f"--{load}", dest="loads", type=whole_numbers, default=loads, metavar=shown, help=help_)
    help_ = "your prompts: one a line, text or JSON with 'prompt' (code, maths, general)"
    add("--prompts", type=Path, metavar="FILE", help=help_)
    add("--max-tokens", type=int, default=tokens, help=f"longest answer ({tokens})")
    help_ = "end then, with the verdicts so far, and say how much time others need (3600)"
    add("--time-limit", type=float, default=3600.0, metavar="SECONDS", help=help_)
    help_ = "keep each measurement there, and go on from them (none)"
    add("--resume", type=Path, metavar="FILE", help=help_)
    help_ = f"write the engine's own options there, and all measurements beside it ({output})"
    add("--output", type=Path, default=Path(output), metavar="FILE", help=help_)
    add("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def main(args: argparse.Namespace) -> int:
    """Measure, print what to do, and write it. Raises ConfigError for what cannot be, before an
    engine is started, and ModelError if the engine fails without drafts."""
    refuse_windows("smart tune")
    stop = time.monotonic() + args.time_limit
    _check(args)
    if args.engine == "sglang" and args.bench_serving:
        return _from_lines(args)
    texts = _texts(args)
    engine = _engine(args, texts)
    for warning in engine.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    search, error = _searched(args, engine, texts, stop)
    choices = _choices(args, search)
    if not choices:
        if error is not None:
            raise error
        raise ModelError("nothing was measured: the time limit was too short")
    print(report.text(search.found, choices, args.loads))
    for line in engine.write(search.found, choices, args.output):
        print(line)
    kept = {"smart_decoding": __version__, "engine": engine.name, **engine.about()}
    kept |= report.plain(search.found, choices)
    reasons = args.output.with_suffix(".reasons.json")
    write_json(reasons, kept)
    if isinstance(engine, Vllm) and args.check and error is None:
        scheduled = engine.with_schedule()
        if scheduled is not None:
            prompts = Prompts(texts, search.found.judged.end)
            kept["checked"] = _checked(args, scheduled, prompts, stop)
            write_json(reasons, kept)
    if isinstance(error, KeyboardInterrupt):
        print("smart: interrupted: this is what was known by then", file=sys.stderr)
        return INTERRUPTED
    if error is not None:
        raise error
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that cannot be."""
    if args.max_tokens < 2:
        raise ConfigError("--max-tokens must be at least 2")
    if args.time_limit <= 0:
        raise ConfigError("--time-limit must be above 0")
    if getattr(args, "context", None) is not None and args.context < 1:
        raise ConfigError("--context must be at least 1")
    for file in (args.output, args.resume):
        if file is not None and (not file.parent.is_dir() or file.is_dir()):
            raise ConfigError(f"{file} cannot be written: it must be a file in an existing folder")


def _texts(args: argparse.Namespace) -> list[str]:
    """Return the user's prompts in a fixed order, or ours, the tasks in turn."""
    if args.prompts is not None:
        texts = list(dict.fromkeys(read_prompts(args.prompts)))
        random.Random(0).shuffle(texts)  # a file may be sorted
    else:
        try:
            tasks = [load_task(task) for task in TASKS]
        except DownloadError as error:
            print(f"smart: only general prompts: {error}", file=sys.stderr)
            tasks = [load_task("general")]
        texts = list(chain.from_iterable(zip(*tasks, strict=False)))
    most = max(args.loads)
    if 2 * most > len(texts):
        raise ConfigError(
            f"{len(texts)} prompts are too few for {most} requests at once: half of them choose, "
            f"the others judge, so give {2 * most}"
        )
    return texts


def _engine(args: argparse.Namespace, texts: Sequence[str]) -> Tunable:
    if args.engine == "llama.cpp":
        server = server_at(args.server)
        more = args.server_args
        return LlamaCpp(server, args.model, args.draft, texts, args.max_tokens, more)
    if args.engine == "vllm":
        arguments = {"model": args.model, **args.engine_args}
        config, lengths = args.speculative_config, args.lengths
        return Vllm(arguments, config, lengths, args.max_tokens, args.context)
    if args.model is None:
        raise ConfigError("a model is missing: smart tune sglang MODEL, or --bench-serving files")
    drafter = ["--speculative-algorithm", args.speculative_algorithm]
    if args.speculative_draft_model_path:
        drafter += ["--speculative-draft-model-path", args.speculative_draft_model_path]
    drafter += ["--speculative-eagle-topk", str(args.speculative_eagle_topk)]
    tiers = sglang_lines.nodes_of(args.nodes) or {steps: steps for steps in args.steps}
    return Sglang(args.model, drafter, tiers, args.max_tokens, args.server_args)


def _searched(
    args: argparse.Namespace, engine: Tunable, texts: Sequence[str], stop: float
) -> tuple[Search, BaseException | None]:
    """Return the search, and what broke it off: Ctrl-C, or the engine's plain decoding. stop: of
    time.monotonic()."""
    free = ("resume", "time_limit", "output", "command", "debug", "check", "loads")
    key = {name: value for name, value in vars(args).items() if name not in free}
    about = engine.about()
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    key |= {"version": about["version"], "texts": digest}
    if args.resume is not None:
        key["machine"] = machine()
    progress = Progress(args.resume, key)
    left = stop - time.monotonic()
    with ending_with_us():
        search = Search(engine, Prompts(texts), progress, stop, _tell)
        try:
            with time_limit(left):
                search.run(sorted(set(args.loads)))
        except (KeyboardInterrupt, ModelError) as error:
            return search, error
    return search, None


def _choices(args: argparse.Namespace, search: Search) -> list[LoadResult]:
    found = [search.found.choice(load) for load in sorted(set(args.loads))]
    return [choice for choice in found if choice is not None]


def _tell(line: str, done: float) -> None:
    """Print what is measured, behind the share of all work that is done."""
    if line:
        print(f"smart: {100 * done:.0f} %, {line}", file=sys.stderr)


def _checked(
    args: argparse.Namespace, scheduled: Vllm, prompts: Prompts, stop: float
) -> dict[str, Any]:
    """Print and return, by batch size, how fast vLLM with the schedule is beside plain vLLM."""
    search = Search(scheduled, prompts, Progress(None, {}), stop)
    with ending_with_us(), time_limit(stop - time.monotonic()):
        search.run(sorted(set(args.loads)))
    ratios = {}
    for load, (verdict,) in search.found.verdicts.items():
        ratio = verdict.ratio
        said = f"{report.interval(ratio)} × plain" if ratio.pairs else "not measured"
        end = f", no verdict: {report.lacking(verdict.lacking)}" if verdict.faster is None else ""
        ratios[str(load)] = [ratio.value, ratio.low, ratio.high]
        print(f"batch {load}, with the schedule: {said}{end}")
    return ratios


def _from_lines(args: argparse.Namespace) -> int:
    """Write costs for SMART inside SGLang from what bench_serving measured."""
    table = sglang_lines.costs_of(args.bench_serving)
    write_costs(args.output, table, sglang_lines.nodes_of(args.nodes))
    for batch, row in table.items():
        shown = ", ".join(f"{k} steps {1e3 * row[k]:.2f} ms" for k in sorted(row))
        print(f"batch {batch}: {shown}")
    return 0
