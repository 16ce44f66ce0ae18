"""On-policy distillation: the loss draws the policy towards a larger model, the teacher, on the policy's completions.

The term in the loss is KL(policy || teacher) at each token of a completion (arXiv 2306.13649, the reverse divergence),
by an estimate from the sampled token alone or over the whole vocabulary. The teacher scores the packed row that the
policy scores, behind its own encoding of the images.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

from open_r1.engines.shared_prefix import score_completions
from open_r1.engines.vllm_backends import engine_dtype
from open_r1.models.loading import check_teacher, load_teacher
from open_r1.trainer.averages import TermMixin


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


class TeacherMixin(TermMixin):
    """Mixin for a `GRPOTrainer` of the shared prefix: its loss has the term of `teacher`, where there is one."""

    def _load_teacher(self, policy: PreTrainedModel) -> nn.Module | None:
        """The recipe's teacher, held as TRL holds a reference model; in the run's 16 bits, or in the policy's dtype."""
        name = getattr(self.args, "teacher_model_name_or_path", None)
        if not name:
            return None
        check_teacher(name, policy.config, self.processing_class)
        teacher = load_teacher(name, engine_dtype(self.args, policy.dtype), policy.config.get_text_config().vocab_size)
        add_fused_lm_head(teacher, temperature=self.temperature)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _compute_loss(self, model, inputs):
        if self.teacher is None or not self.model.training:
            return super()._compute_loss(model, inputs)
        kl = self._ask_teacher(inputs)
        loss = super()._compute_loss(model, inputs)
        return loss + self.args.distill_coef * self._mean_of("distill/kl", kl(), inputs["completion_mask"], inputs)

    def _ask_teacher(self, inputs: dict[str, Any]) -> Callable[[], torch.Tensor]:
        """Let the teacher score a micro-batch; what is returned gives KL (B, C) when the policy has scored it, too."""
        ids, mask, scored = inputs["completion_ids"], inputs["completion_mask"], inputs["pixel_values"]
        # what a frozen vision tower made of the images is the policy's, not the teacher's
        own = {prompt: replace(prompt, image_features=None) for prompt in scored.prompts}
        prompts, size = [own[prompt] for prompt in scored.prompts], len(ids)
        states: list[torch.Tensor] = []  # one (1, S, H') of the scored positions
        whole: list[torch.Tensor] = []  # one (S,)
        with torch.no_grad(), self._timed("scoring"), self.accelerator.autocast():
            logps, *_ = score_completions(self.teacher, self.family, prompts, ids, mask, size, observe=states.append)
        if not self.args.distill_whole_vocabulary:
            return lambda: sampled_kl(scored.logps, logps)
        models = self.plain_model(), self.accelerator.unwrap_model(self.teacher)
        head, teacher_head = (model.get_output_embeddings() for model in models)
        teachers = states[0][0], teacher_head, self.temperature
        scored.observe = lambda policys: whole.append(whole_kl(policys[0], head, *teachers))
        return lambda: torch.zeros_like(scored.logps).masked_scatter(mask.bool(), whole[0])
