"""On-policy distillation: the loss draws the policy towards a larger model, the teacher, on the policy's completions.

The term in the loss is KL(policy || teacher) at each token of a completion (arXiv 2306.13649, the reverse divergence),
by an estimate from the sampled token alone or over the whole vocabulary. The teacher scores the packed row that the
policy scores, behind its own encoding of the images.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from open_r1.engines.shared_prefix import Prompt, score_completions
from open_r1.models.families import Family


def sampled_kl(logps: torch.Tensor, teacher_logps: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy || teacher) at every sampled token: log p - log q, with the divergence's own gradient.

    For tokens sampled from the policy p both are unbiased: the value (k1 of http://joschu.net/blog/kl-approx.html), and
    the gradient (log p - log q) * grad log p, a policy gradient with log q - log p as the advantage of each token. The
    value differentiated as it stands would have a gradient of mean 0, and that of k3, r - log r - 1, is the gradient of
    the other divergence (arXiv 2506.09477).

    Args:
        logps: (B, C), of the policy that sampled, with a gradient.
        teacher_logps: (B, C), without one.

    Returns:
        (B, C), nats; below 0 where the teacher finds a token more likely.
    """
    difference = (logps - teacher_logps).detach()
    return difference * (1 + logps - logps.detach())


def whole_kl(
    states: torch.Tensor, head: nn.Module, teacher_states: torch.Tensor, teacher_head: nn.Module, temperature: float
) -> torch.Tensor:
    """KL(policy || teacher) over the whole vocabulary at each position, as TRL 1.16's `DistillationTrainer` has it.

    TRL's kernel projects tiles of both models' logits and keeps none; it reads the policy's tokens alone.

    Args:
        states: (S, H), hidden states of the policy in front of its LM head, with a gradient.
        teacher_states: (S, H'), without one.
        head, teacher_head: the LM heads; the teacher's has as many tokens or more.
        temperature: of both distributions.

    Returns:
        (S,), nats.
    """
    reverse = 1.0
    weights = head.weight, head.bias, teacher_states, teacher_head.weight, teacher_head.bias
    kl, _ = ChunkedDivergenceFunction.apply(states, *weights, reverse, temperature)
    return kl


@torch.no_grad()
def ask_teacher(
    teacher: nn.Module,
    family: Family,
    prompts: Sequence[Prompt],
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let a teacher score a micro-batch of completions, in one forward pass.

    Args:
        teacher: prepared by `enable_grouping`, also behind the wrappers of a trainer.
        family: of both models.
        prompts: of each of the B rows; neighbours that are one object share it.
        completion_ids, completion_mask: (B, C), padded on the right.

    Returns:
        Log-probabilities (B, C), and the hidden states of the scored positions, (S, H').
    """
    # what a frozen vision tower made of the images is the policy's, not the teacher's
    own = {prompt: replace(prompt, image_features=None) for prompt in prompts}
    states: list[torch.Tensor] = []
    logps, *_ = score_completions(
        *(teacher, family, [own[prompt] for prompt in prompts], completion_ids, completion_mask),
        batch_size=len(completion_ids),
        observe=states.append,
    )
    return logps, states[0][0]
