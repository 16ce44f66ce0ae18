"""PAPO's term in the loss and NoisyRollout's noisy images, which should make a policy depend on its images.

PAPO (arXiv 2507.06448) rewards the policy for saying something else when most of its image is black. NoisyRollout
(arXiv 2504.13055) samples half of a group from a noisy image, and learns from all of it as if from the clean one. All
that is random here follows from numbers, so that a resumed run draws the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from open_r1.engines.shared_prefix import Prompt, rows_by_prompt
from open_r1.models.families import Family
from open_r1.trainer.averages import TermMixin
from open_r1.trainer.rows import put_images

MOST_KL = 10.0  # nats of one token
# How much of an image's energy is left after each step of NoisyRollout's diffusion, its code's numbers.
KEPT = np.cumprod(1 - (1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000)))))
# Where of a run the noise has half its strength, and how steeply it falls: step 40 of 60 and 30 in NoisyRollout's run.
MIDDLE, STEEPNESS = 2 / 3, 30


def mask_prompts(
    prompts: Sequence[Prompt],
    family: Family,
    processor: ProcessorMixin,
    share: float,
    random_of: Callable[[int], np.random.Generator],
) -> list[Prompt]:
    """Each row's prompt with masked images; neighbours of one prompt share the masked one.

    PAPO's code blackens 14 x 14 squares of the image before it is resized; here they are the
    model's own patches. A prompt without an image stays, and is scored too: under ZeRO-3 all ranks
    must run as many forward passes.

    Args:
        prompts: of each row.
        family, processor: of the model.
        share: the probability of each patch to be black.
        random_of: the random numbers of the group that a row begins.
    """
    masked = []
    for rows in rows_by_prompt(prompts):
        prompt = prompts[rows[0]]
        if prompt.image_inputs:
            black = family.blacken(prompt.image_inputs, processor, share, random_of(rows[0]))
            prompt = replace(prompt, image_inputs=black, image_features=None)
        masked += [prompt] * len(rows)
    return masked


def perception_kl(logps: torch.Tensor, masked_logps: torch.Tensor) -> torch.Tensor:
    """An estimate of KL(policy with the image || policy with the masked one) at every sampled token.

    With r = p_masked / p it is r - log r - 1 (k3 of http://joschu.net/blog/kl-approx.html), unbiased for tokens sampled
    from p; at most `MOST_KL`, beyond which a token has no gradient, as in PAPO's code. The paper's term also has a
    gradient through the masked policy; its code by default has none (RECOMPUTE_AUG_LOG_PROBS is false, and
    https://github.com/MikeWangWZHL/PAPO/issues/20), and so it is here. Raising it then follows the gradient of the
    other divergence, KL(masked || policy).

    Args:
        logps: (B, C), of the policy, with a gradient.
        masked_logps: (B, C), of the policy that sampled, behind the masked image, without one.

    Returns:
        (B, C), nats.
    """
    difference = (masked_logps - logps).clamp(-20, 20)  # an infinite ratio would have a gradient of NaN
    return (difference.expm1() - difference).clamp(max=MOST_KL)  # exp() - 1 would round a small divergence away


def noise_step(start: float, progress: float) -> int:
    """The step of diffusion, of 1000, to which images are noised when a share `progress` of the run is over.

    NoisyRollout's sigmoid: `start` for the first half of a run, half of it after two thirds, 0 at the end.
    """
    return round(start / (1 + math.exp(STEEPNESS * (progress - MIDDLE))))


def split_halves(start: int, count: int, size: int) -> list[tuple[bool, int]]:
    """Which rows of one prompt are sampled from a noisy image: those in the second half of their group.

    Args:
        start: the number of the first row over all processes, whose groups follow each other.
        count: of the rows.
        size: of a group.

    Returns:
        Runs of rows (is noisy, how many), in order. The first is clean, with no row if need be: a process may have the
        noisy half alone, and the clean prompt is scored.
    """
    is_noisy = [2 * (row % size) >= size for row in range(start, start + count)]
    runs = [(noisy, len(list(rows))) for noisy, rows in groupby(is_noisy)]
    return [(False, 0), *runs] if runs[0][0] else runs


def add_noise(image: Image.Image, step: int, rng: np.random.Generator) -> Image.Image:
    """The image after `step` steps of diffusion, as NoisyRollout adds noise: 500 leaves 0.86 of it under noise of 0.51.

    Its code shrinks an image to the recipe's pixels before; here the image has the size that it was given in.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # (height, width, 3)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    noisy = math.sqrt(KEPT[step]) * pixels + math.sqrt(1 - KEPT[step]) * noise
    return Image.fromarray((noisy.clip(0, 1) * 255).round().astype(np.uint8))


class PerceptionMixin(TermMixin):
    """Mixin for a `GRPOTrainer` of the shared prefix: PAPO's term in its loss, NoisyRollout's images in rollouts."""

    papo_coef = property(lambda self: getattr(self.args, "papo_coef", 0.0))
    rollout_noise = property(lambda self: getattr(self.args, "rollout_noise", 0.0))

    def _seeded(self, group: int) -> np.random.Generator:
        """Random numbers of a group (counted over all processes) of this rollout."""
        return np.random.default_rng((self.args.seed, self._rollout_number(), group))

    def _encode_parts(
        self, prompt: list[dict[str, Any]] | str, images: Sequence[Image.Image], row: int, count: int
    ) -> list[tuple[Prompt, int]]:
        """What a prompt's completions are sampled from, with how many are; the first is clean, and scored for all.

        Args:
            prompt: with its images inside.
            images: of the prompt.
            row: the number of its first completion over all processes.
            count: of its completions.
        """
        clean, noise = self.backend.encode(prompt), 0
        if self.rollout_noise and self.model.training and images:
            noise = noise_step(self.rollout_noise, self.state.global_step / max(self.state.max_steps, 1))
        if not noise:
            return [(clean, count)]
        size = self._group_size()
        rng = self._seeded(row // size)
        noisy = self.backend.encode(put_images(prompt, [add_noise(image, noise, rng) for image in images]))
        return [(noisy if is_noisy else clean, times) for is_noisy, times in split_halves(row, count, size)]

    def _masked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """`mask_prompts` of a rollout in training, with its random numbers."""
        first = self.accelerator.process_index * len(prompts)
        settings = self.family, self.processing_class, self.args.papo_mask_ratio
        return mask_prompts(prompts, *settings, lambda row: self._seeded((first + row) // self.num_generations))

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if "masked_logps" not in inputs:
            return loss
        mask = inputs["completion_mask"]
        sees = torch.tensor([[bool(prompt.image_inputs)] for prompt in inputs["prompts"]], device=mask.device)
        kl = perception_kl(inputs["pixel_values"].logps, inputs["masked_logps"]) * sees
        return loss - self.papo_coef * self._mean_of("papo/kl", kl, mask * sees, inputs)
