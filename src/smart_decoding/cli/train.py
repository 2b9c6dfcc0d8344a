"""`smart train`: the target writes its own conversations, then a draft head is trained on them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.model_options import add_allow_slow
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError
from smart_decoding.kernels import children
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL
from smart_decoding.options import add_options

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.loading import Checkpoint
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.heads.files import HeadFiles
    from smart_decoding.training.generate import PictureTurn
    from smart_decoding.training.train import TrainOptions

TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart train`."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        help=f"the target: name, hub id, folder or GGUF file (default: {DEFAULT_MODEL})",
    )
    add(
        "--output",
        type=Path,
        required=True,
        help="folder of the head; an unfinished one is resumed",
    )
    _add_data(parser.add_argument_group("conversations"))
    _add_head(parser.add_argument_group("head"))
    add("--seconds", type=float, default=2400, help="training time over all resumed runs (2400)")
    add(
        "--prior-prompts",
        type=int,
        default=60,
        help="held-out prompts that the prior is learned on (60)",
    )
    add("--seed", type=int, default=0, help="seed of all random choices (0)")
    add_allow_slow(parser)


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", type=Path, help="folder of the conversations (default: OUTPUT/data)")
    add(
        "--tokens",
        type=int,
        default=1_000_000,
        help="tokens of all conversations, prompts included (1000000)",
    )
    add_options(group, EngineArgs, ("activations",), unset=True)
    add("--skip-generation", action="store_true", help="train on the conversations that are there")
    add(
        "--images",
        type=Path,
        metavar="PATH",
        help="converse about images, with a model that takes them: a folder of them, or a JSONL "
        'file whose lines are {"image": FILE, "question": TEXT}',
    )
    add(
        "--without-tasks",
        default="",
        help="leave out conversations that share eight words with a prompt of these tasks of smart "
        "bench (none)",
    )


def _add_head(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    rows = "output rows of the head: frequent tokens (8192)"
    add("--draft-vocab", type=int, default=8192, help=rows)
    add(
        "--intermediate-size",
        type=int,
        metavar="N",
        help="neurons of its feed-forward network (default: as in what it starts from)",
    )
    add(
        "--aux-layers",
        help="layers whose outputs the head reads, such as 4,15,30 (default: early, middle, last)",
    )
    init = "a head to start from, in any layout: folder, hub id, or built-in model (none)"
    add("--init", help=init)
    add_options(group, EngineArgs, ("trust_pickle",))
    add(
        "--head-quantization",
        choices=("int8", "int4"),
        help="write the head's matrices in 8 or 4 bits (default: bf16)",
    )
    add(
        "--export",
        choices=("eagle3", "speculators", "eagle"),
        help="write the head in this layout (default: --init's)",
    )
    add(
        "--visual-positions",
        choices=("dropped", "decoupled"),
        help="what the head reads of pictures: nothing, or their embeddings in place of tokens' "
        "(default: as --init)",
    )


def main(args: argparse.Namespace) -> int:
    """Have the conversations written, train the head, learn its prior."""
    from smart_decoding.models.heads.export import check_rope
    from smart_decoding.training.conversations import recorded_layers
    from smart_decoding.training.prior import learn_prior, picture_turns
    from smart_decoding.training.train import Trainer

    _use_huge_pages()
    turns = _turns(args.images) if args.images is not None else None
    checkpoint = _target(args)
    keep = _without(checkpoint, args.without_tasks.split(",")) if args.without_tasks else None
    init = _initial(args, checkpoint.config) if args.init else None
    options = _train_options(args, checkpoint.config.layers, init)
    check_rope(init.shape if init else checkpoint.config, options.layout)
    _check(args)
    data = _data(args)
    if not args.skip_generation:
        layers = recorded_layers(options.aux_layers, checkpoint.config.layers)
        _generate(args, layers, data, turns[0] if turns else None)
    trainer = Trainer(checkpoint, data, args.output, options, keep, init)
    figures: dict[str, Any] = trainer.run()
    held_out: Sequence[Any]
    if turns is None:
        held_out = trainer.held_out_prompts()
    else:
        _write_visual_positions(args.output / "config.json", options.supports_images)
        held_out = picture_turns(turns[1], args.prior_prompts)
    print(json.dumps(figures, indent=1))
    learn_prior(
        args.model,
        args.output,
        held_out[: args.prior_prompts],
        trust_pickle=args.trust_pickle,
        allow_slow=args.allow_slow,
    )
    print(f"the head is in {args.output}: smart run -m {args.model} --draft {args.output} PROMPT")
    return 0


def _check(args: argparse.Namespace) -> None:
    from smart_decoding.core.policies.base import require_int

    require_int("tokens", args.tokens, 1, 1 << 40)
    require_int("prior_prompts", args.prior_prompts, 0, 1 << 20)
    require_int("seed", args.seed, 0, 1 << 62)
    if args.activations and args.skip_generation:
        raise ConfigError("--activations is of conversations, and --skip-generation writes none")


def _data(args: argparse.Namespace) -> Path:
    from smart_decoding.training.shards import have_pictures

    data: Path = args.data or args.output / "data"
    if args.images is None and args.prior_prompts and have_pictures(data):
        raise ConfigError(
            f"the conversations in {data} are about pictures: give --images, for the prior is "
            "learned on those that they leave out"
        )
    return data


def _target(args: argparse.Namespace) -> Checkpoint:
    """Return the model to train a head for, checked to run here."""
    from smart_decoding.models.checkpoints.loading import load_checkpoint
    from smart_decoding.models.cpu.kernel_check import require_kernels, require_served
    from smart_decoding.models.target import device_of

    device = device_of("auto")  # where LLM will run, for the conversations and for the prior
    require_kernels(device, args.allow_slow)
    checkpoint = load_checkpoint(
        args.model,
        lambda config: require_served(config, device, args.allow_slow),
        trust_pickle=args.trust_pickle,
    )
    if args.images is not None and checkpoint.vision is None:
        raise ConfigError(
            f"--images needs a model that takes images, and {args.model} reads text only "
            "(docs/vision.md)"
        )
    return checkpoint


def _train_options(args: argparse.Namespace, layers: int, init: HeadFiles | None) -> TrainOptions:
    """Return the options of training. layers: the target's. Raises ConfigError."""
    from smart_decoding.models.heads.export import layout_of
    from smart_decoding.training.train import TrainOptions

    layout = args.export or (layout_of(init) if init else "smart")
    if layout == "eagle" and not init:
        raise ConfigError("--export eagle needs an EAGLE-1/2 head to start from: give --init")
    supports_images = init is not None and init.supports_images
    if args.visual_positions:
        supports_images = args.visual_positions == "decoupled"
    if supports_images and args.images is None:  # pictures' embeddings would not be recorded
        raise ConfigError(
            "a head that reads pictures needs conversations about them: give --images"
        )
    return TrainOptions(
        init.aux_layers if init else _aux_layers(args.aux_layers, layers),
        args.seconds,
        args.draft_vocab,
        seed=args.seed,
        layout=layout,
        supports_images=supports_images,
        intermediate_size=args.intermediate_size,
        quantization=args.head_quantization,
    )


def _turns(images: Path) -> tuple[PictureTurn, PictureTurn]:
    from smart_decoding.training.seeds import held_out, image_turn, read_questions

    train, kept = held_out(read_questions(images))
    return partial(image_turn, train), partial(image_turn, kept)


def _initial(args: argparse.Namespace, target: ModelConfig) -> HeadFiles:
    """Return the head to start from, checked to be trainable and writable."""
    from smart_decoding.models.checkpoints.registry import shipped_head
    from smart_decoding.models.heads.export import check_layout, layout_of
    from smart_decoding.models.heads.files import head_path, load_head
    from smart_decoding.training.head import form_of

    if args.aux_layers:
        raise ConfigError(
            "--aux-layers cannot be chosen with --init: the head reads the layers that it was "
            "trained on"
        )
    folder = shipped_head(args.init) or head_path(args.init, args.trust_pickle)
    files = load_head(folder, target, args.trust_pickle)
    form_of(files)
    check_layout(files, args.export or layout_of(files))
    return files


def _generate(
    args: argparse.Namespace, aux_layers: tuple[int, ...], data: Path, turn: PictureTurn | None
) -> None:
    from smart_decoding.llm import LLM
    from smart_decoding.training.generate import CONCURRENT, Recorder, generate

    llm = LLM(
        args.model,
        generation_config="vllm",
        speculative_config=False,
        max_num_seqs=CONCURRENT,
        max_model_len=512 if turn is None else None,  # a picture may take many positions
        kv_cache_tokens=CONCURRENT * 400,
        enable_prefix_caching=False,
        stop_at_loops=True,
        activations=args.activations,
        trust_pickle=args.trust_pickle,
        allow_slow=args.allow_slow,
    )
    recorder = Recorder(aux_layers)
    llm.engine.listen(recorder)
    generate(llm, recorder, data, args.tokens, args.seed, turn)


def _write_visual_positions(path: Path, supports_images: bool) -> None:
    from smart_decoding.models.heads.files import VISUAL_POSITIONS

    config = json.loads(path.read_text())
    config["visual_positions"] = VISUAL_POSITIONS[supports_images]
    path.write_text(json.dumps(config, indent=1) + "\n")


def _use_huge_pages() -> None:
    """Start the command anew with memory on huge pages: page faults take half of a step."""
    is_command = sys.platform == "linux" and Path(sys.argv[0]).name == "smart"
    if is_command and "GLIBC_TUNABLES" not in os.environ:
        environment = {**children.environment(), "GLIBC_TUNABLES": TUNABLES}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def _without(checkpoint: Checkpoint, tasks: Sequence[str]) -> Callable[[Sequence[int]], bool]:
    from smart_decoding.measuring.tasks import load_task, ngrams
    from smart_decoding.models.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(checkpoint.tokenizer_source)
    taken = set().union(*(ngrams(prompt) for task in tasks for prompt in load_task(task)))
    return lambda tokens: taken.isdisjoint(ngrams(tokenizer.decode(list(tokens))))


def _aux_layers(text: str | None, layers: int) -> tuple[int, ...]:
    if text is None:
        return (max(1, layers // 8 + 1), layers // 2, layers)
    try:
        aux_layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        aux_layers = ()
    if not aux_layers or aux_layers[0] < 1 or aux_layers[-1] > layers:
        raise ConfigError(
            f"--aux-layers {text!r} must be layer counts from 1 to {layers}, such as 4,15,{layers}"
        )
    return aux_layers
