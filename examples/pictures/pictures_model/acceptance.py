"""How draft heads do on long answers about pictures: acceptance by depth, and tokens a round.

    python -m pictures_model acceptance [HEAD[:dropped|:decoupled] ...]

HEAD is a folder (default: this model's head), or a built-in model's name for the head that comes
with it. Greedy, on the prompts of the benchmark's task `pictures`, none of which was trained on.
Printed: of a chain of six tokens the share accepted at each depth, where all before it were, and
the tokens that a round gives; and those of MSD's tree of 60 tokens. No figure depends on time.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np

from pictures_model.assembly import HEAD, model_folder
from pictures_model.prompts import picture_prompts
from smart_decoding import LLM, SamplingParams
from smart_decoding.models.checkpoints.registry import shipped_head

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round

DEPTH = 6


def acceptance(llm: LLM, prompts: list[Any], limit: int) -> tuple[list[float], float]:
    """By depth, and tokens a round."""
    reached = np.zeros(DEPTH + 1)
    accepted = np.zeros(DEPTH + 1)
    rounds = []

    def watch(done: Round) -> None:
        trees = done.trees
        right = done.next_token >= 0
        if not len(trees) or done.batch.prefill_rows:
            return
        follows = np.where(trees.parent < 0, True, right[trees.parent])
        for depth in range(1, DEPTH + 1):
            at = follows & (trees.depth == depth)
            reached[depth] += at.sum()
            accepted[depth] += (at & right).sum()
        rounds.append(right.sum() / done.batch.size)

    llm.policy.observe = watch  # type: ignore[method-assign, assignment]
    llm.chat(prompts, SamplingParams(temperature=0, max_tokens=limit))
    return list(accepted[1:] / reached[1:].clip(1)), 1 + float(np.mean(rounds))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pictures_model acceptance", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("heads", nargs="*", metavar="HEAD", default=[str(HEAD)])
    parser.add_argument("--model", help="name, hub id or folder (default: the demonstration model)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints a table with a row for each head."""
    args = _arguments(argv)
    plain = LLM(
        args.model or model_folder(),
        speculative_config=False,
        max_num_seqs=1,
        max_model_len=512,
        enable_prefix_caching=False,
    )
    texts = picture_prompts()[: args.prompts]
    chats = [[{"role": "user", "content": text}] for text in texts]
    names = " | ".join(str(depth) for depth in range(1, DEPTH + 1))
    print(f"| head | {names} | tokens a round, chain of {DEPTH} | tree of 60 |")
    print(f"|---|{'---:|' * (DEPTH + 2)}")
    for given in args.heads:
        name, _, how = given.partition(":")
        config = {"method": "eagle", "model": str(shipped_head(name) or name)}
        config |= {"visual_positions": how} if how else {}
        chain = plain.sharing_weights({**config, "policy": "chain", "length": DEPTH})
        shares, tokens = acceptance(chain, chats, args.max_tokens)
        tree = plain.sharing_weights({**config, "policy": "eagle2"})
        _, of_tree = acceptance(tree, chats, args.max_tokens)
        shown = " | ".join(f"{share:.3f}" for share in shares)
        print(f"| {given} | {shown} | {tokens:.2f} | {of_tree:.2f} |", flush=True)
    return 0
