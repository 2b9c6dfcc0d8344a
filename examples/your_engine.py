"""SMART's decisions in a loop of your own, around two transformers models with full attention and
one vocabulary: folders, hub ids or built-in names, such as qwen2.5-coder-1.5b qwen2.5-coder-0.5b.

python examples/your_engine.py TARGET DRAFTER "a prompt"     # one request, greedy"""

import sys
from timeit import default_timer, timeit

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, DynamicLayer

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.costs import DraftSample, VerifySample
from smart_decoding.core.policies import make_policy
from smart_decoding.core.tree import ROOT, DraftTrees, accept
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.registry import NAMED_MODELS
from smart_decoding.profiling.fit import fit_costs

SIZES = (1, 1, 1, 2, 4, 8, 16, 32)  # rows to measure; medians count, so the first may be slow


class CachedModel:
    """A model whose cache holds `length` tokens of the text, and behind them `nodes` of a tree."""

    def __init__(self, model):
        self.model, self.cache, self.length, self.nodes = model, DynamicCache(), 0, []
        if {*map(type, DynamicCache(config=model.config).layers)} != {DynamicLayer}:
            raise ValueError("every layer must have full attention: no window, no state")

    @torch.inference_mode()
    def read(self, text, trees=None, nodes=()):
        """Logits after each token of the text not read yet, then after each node: [rows, vocab]."""
        first, self.length, self.nodes = self.length, len(text), [*self.nodes, *nodes]
        column = {node: len(text) + i for i, node in enumerate(self.nodes)}
        visible = [set(range(position + 1)) for position in range(first, len(text))]
        visible += [{*range(len(text)), *map(column.get, trees.path(node))} for node in nodes]
        hidden = [[at not in row for at in range(len(text) + len(self.nodes))] for row in visible]
        return self.model(
            input_ids=torch.tensor([[*text[first:], *(int(trees.token[node]) for node in nodes)]]),
            position_ids=torch.tensor([[len(row) - 1 for row in visible]]),
            attention_mask=torch.tensor(hidden).to(self.model.dtype)[None, None] * -1e9,
            past_key_values=self.cache,
        ).logits[0]

    def keep(self, path):
        """Of the tree, the nodes of `path` become text; the others are dropped."""
        rows = [self.length + self.nodes.index(node) for node in path if node in self.nodes]
        for layer in self.cache.layers:
            layer.keys = layer.keys[:, :, [*range(self.length), *rows]]
            layer.values = layer.values[:, :, [*range(self.length), *rows]]
        self.length, self.nodes = self.length + len(rows), []


def folder_of(name):
    """A folder or hub id as it is; a built-in model's weights in bf16, fetched if need be."""
    return load_checkpoint(name).tokenizer_source if name in NAMED_MODELS else name


def seconds_of(model, rows):
    return timeit(lambda: CachedModel(model).read([0] * rows), number=1)


def draft(rule, drafter, text):
    """The tree, grown level by level as the rule says; rows and seconds of each level."""
    trees, rows, seconds, nodes = DraftTrees.empty(1), [], [], np.array([ROOT])
    while rule and len(rows) < rule.levels and len(nodes):
        start = default_timer()
        logits = drafter.read(text, trees, nodes if rows else ())
        prob, token = logits[-len(nodes) :].softmax(-1).topk(rule.children)
        trees.append(0, token.flatten(), nodes.repeat(rule.children), prob.flatten())
        rows, seconds = [*rows, len(logits)], [*seconds, default_timer() - start]
        nodes = rule.frontier(trees, len(rows))
    return trees, rows, seconds


def generate(target, drafter, prompt, max_new_tokens, policy=None):
    """The answer's tokens, those of `target.generate`. policy: any of `make_policy`'s, or yours."""
    ends = [end for end in np.ravel(target.generation_config.eos_token_id) if end is not None]
    if policy is None:  # costs are measured here, and corrected by every round
        samples = [VerifySample(1, rows, 0, seconds_of(target, rows)) for rows in SIZES]
        samples += [DraftSample(rows, 0, seconds_of(drafter, rows)) for rows in SIZES]
        policy = make_policy("smart", cost=fit_costs(samples), eos_token_ids=ends)
    target, drafter = CachedModel(target), CachedModel(drafter)
    limit = len(prompt) + max_new_tokens
    text = [*prompt, int(target.read(prompt)[-1].argmax())]
    while len(text) < limit and text[-1] not in ends:
        context, remaining = np.array([len(text) - 1]), np.array([limit - len(text)])
        waiting = len(text) - 1 - drafter.length
        batch = BatchState(context, remaining, np.zeros(1), np.ones(1, bool), catch_up_rows=waiting)
        rule = policy.plan(batch)
        trees, rows, seconds = draft(rule, drafter, text)
        kept = rule.select(trees) if rule else np.zeros(0, int)
        start = default_timer()
        best = target.read(text, trees, kept).argmax(-1).numpy()  # of the root, then of each node
        took = accept(trees.take(kept), best.take)
        after = np.full(len(trees), -1)
        after[kept] = took.next_token
        done = (after, took.root_next, rows, seconds, len(best), default_timer() - start)
        policy.observe(Round(batch, rule, trees, kept, *done))
        for model in (target, drafter):
            model.keep(kept[took.path[0]])
        text += took.emitted[0]
    answer = text[len(prompt) : limit]
    return answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), None)]


if __name__ == "__main__":
    *names, prompt = sys.argv[1:] if len(sys.argv) == 4 else sys.exit(__doc__)
    folders = [folder_of(name) for name in names]
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in folders]
    print(tokenizer.decode(generate(*models, tokenizer(prompt).input_ids, 100)))
