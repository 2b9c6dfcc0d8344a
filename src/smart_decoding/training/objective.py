"""The training objective: a head's logits over the draft vocabulary, and its target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.heads.export import output_rows

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.loading import Checkpoint
    from smart_decoding.models.heads.files import HeadFiles
    from smart_decoding.training.conversations import Conversation
    from smart_decoding.training.head import TrainableHead


class SoftCrossEntropy(torch.autograd.Function):
    """Mean of -sum(p_target * log_softmax(student)) over rows [n, classes].

    It takes few passes over memory: the gradient is made in the forward pass, in the student's
    dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, p_target: Tensor) -> Tensor:
        """Return the loss."""
        log_prob = student.float().log_softmax(-1)
        loss: Tensor = -torch.linalg.vecdot(p_target, log_prob).mean()
        mass = p_target.sum(-1, keepdim=True)
        grad = log_prob.exp_().mul_(mass).sub_(p_target).div_(max(len(student), 1))
        ctx.save_for_backward(grad.to(student.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the student's gradient."""
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None


class Objective:
    """Borrows the target's embeddings, final norm, and output rows of the draft vocabulary."""

    def __init__(self, checkpoint: Checkpoint, draft_ids: Tensor, init: HeadFiles | None) -> None:
        weights = checkpoint.weights
        own = None if init is None else init.weights.get("embed_tokens.weight")
        self._rms_eps = checkpoint.config.rms_eps
        self.embedding = as_tensor(
            weights["model.embed_tokens.weight"] if own is None else own
        ).float()
        self._head_rows = output_rows(checkpoint)[draft_ids].float()
        self._norm = as_tensor(weights["model.norm.weight"]).float()
        self.draft_of = torch.full((checkpoint.config.vocab,), -1)  # token -> draft id, or -1
        self.draft_of[draft_ids] = torch.arange(len(draft_ids))

    @torch.no_grad()
    def p_target(self, last: Tensor, chosen: Tensor) -> Tensor:
        """Return [n, draft vocabulary]: half the target's distribution, half its choice.

        last: [n, hidden] the target's last states. chosen: [n] its choices in draft ids, or -1."""
        p_target = self._logits(self._final_norm(last)).float().softmax(-1).mul_(0.5)
        known = (chosen >= 0).nonzero()[:, 0]
        p_target[known, chosen[known]] += 0.5
        return p_target

    def features(self, head: TrainableHead, aux_hidden: Tensor) -> Tensor:
        """Return the head's features of the states [..., aux_count * hidden] that it reads."""
        return head.features(self._final_norm(aux_hidden) if head.form.fused else aux_hidden)

    def student(self, head: TrainableHead, out: Tensor) -> Tensor:
        """Return logits [n, draft vocabulary] of the head's outputs [n, hidden]."""
        if head.form.fused:
            return self._logits(out)
        normed = head.norm(out)
        return self._logits(normed) if head.lm_head is None else cast(Tensor, head.lm_head(normed))

    def _final_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._norm, self._rms_eps)

    def _logits(self, normed: Tensor) -> Tensor:
        return F.linear(normed, self._head_rows)


@torch.no_grad()
def append_choices(data: Sequence[Conversation], checkpoint: Checkpoint) -> None:
    """Append the target's choice behind the last recorded token.

    Mostly it is the answer's end, which the target never reads. A head learns to propose ends only
    from such tokens."""
    config = checkpoint.config
    output = output_rows(checkpoint).float()
    norm = as_tensor(checkpoint.weights["model.norm.weight"]).float()
    for start in range(0, len(data), 256):
        part = data[start : start + 256]
        last = torch.stack([item.aux_hidden[-1, -config.hidden :] for item in part]).float()
        normed = F.rms_norm(last, last.shape[-1:], norm, config.rms_eps)
        for item, token in zip(part, F.linear(normed, output).argmax(-1), strict=True):
            item.tokens = torch.cat((item.tokens, token[None]))
