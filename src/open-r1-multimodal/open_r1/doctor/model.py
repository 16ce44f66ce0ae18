"""Checks a model's log-probabilities on two examples: what must change them, and what must not.

What should be equal may differ by rounding, which in 16 bits is 50 times as much with trained
weights as with random ones. So the run's own is measured: its scores against those that the same
weights give in float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from accelerate.utils import is_peft_model
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.trainer.utils import pad, selective_log_softmax, use_adapter

from open_r1.base.images import open_image
from open_r1.doctor.finding import Checks, Finding, failed, passed, skipped, warned
from open_r1.doctor.run import Missing, Run
from open_r1.engines.agreement import MULTIPLE, SHORT, InFloat32
from open_r1.engines.shared_prefix import Prompt, encode_prompt
from open_r1.models.families import family_of
from open_r1.running.data import Row, count_prompt_tokens
from open_r1.trainer.rows import with_images_inside
from open_r1.trainer.trainer import Scored

TRIED = 32  # rows among which the shortest and the longest prompt are taken
FLOOR = 1e-4  # nats, what float32 rounds and more (docs/measured.md)
UNSEEN = 1e-6  # a difference between two images that is none
PASSES = 4  # over the two examples, of all checks together
SECONDS = 60  # that all checks may take on a CPU


def questions(run: Run) -> list[Row]:
    """Two examples, with images if there are any: those with the shortest and longest prompt."""
    tried = [run.rows[index] for index in range(min(TRIED, len(run.rows)))]
    tried = [row for row in tried if row["images"]] or tried
    tried.sort(key=lambda row: count_prompt_tokens(row, run.processor, **run.template_kwargs))
    return [{**row, "images": [open_image(image) for image in row["images"]]} for row in (tried[0], tried[-1])]


def encode(run: Run, row: Row) -> Prompt:
    """A question as the run encodes it."""
    prompt = with_images_inside(row)["prompt"]
    return encode_prompt(plain_model(run), run.processor, prompt, **run.template_kwargs)


def plain_model(run: Run) -> PreTrainedModel:
    """The policy without an adapter around it."""
    model = run.trainer.model
    return model.get_base_model() if is_peft_model(model) else model


def score(run: Run, rows: Sequence[Row], shared: bool | None = None, model: nn.Module | None = None) -> torch.Tensor:
    """Log-probabilities of the tokens of right answers, in one batch through the run's trainer.

    Args:
        rows: examples with decoded images.
        shared: whether completions share their prompt; None: as the recipe says.
        model: in place of the policy.

    Returns:
        (N,) in the order of rows, their completions and the tokens of these.
    """
    with torch.no_grad(), run.trainer.accelerator.autocast():
        if run.is_grpo:
            return score_with_grpo(run, rows, shared, model)
        return score_labels(run, rows)


def score_with_grpo(run: Run, rows: Sequence[Row], shared: bool | None, model: nn.Module | None) -> torch.Tensor:
    """A short and a long completion of each row through GRPO's trainer."""
    trainer, family, tokenizer = run.trainer, family_of(plain_model(run)), run.processor.tokenizer
    device = trainer.accelerator.device
    texts = []
    for row in rows:
        answer = f"<answer>{row['solution'] or 'yes'}</answer>"
        texts += [answer, f"I look at the picture, and look again.</think>\n{answer}"]
    completions = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    prompts = [prompt for row in rows for prompt in [encode(run, row)] * 2]

    prompt_ids = [prompt.input_ids for prompt in prompts]
    prompt_mask = pad([torch.ones_like(ids) for ids in prompt_ids], 0, "left").to(device)  # (B, P)
    prompt_ids = pad(prompt_ids, tokenizer.pad_token_id, "left").to(device)
    mask = pad([torch.ones_like(ids) for ids in completions]).to(device)  # (B, C)
    completion_ids = pad(completions, tokenizer.pad_token_id).to(device)
    ids, lengths = torch.cat([prompt_ids, completion_ids], dim=1), torch.cat([prompt_mask, mask], dim=1)
    network, kept = model or trainer.model, completion_ids.shape[1]
    if trainer.shared_prefix if shared is None else shared:
        scored = Scored(prompts)
        logps, *_ = trainer._get_per_token_logps_and_entropies(network, ids, lengths, kept, pixel_values=scored)
    else:
        is_image = (prompt_ids == run.processor.image_token_id).long()
        images = family.join_images([prompt.image_inputs for prompt in prompts], device)
        images |= family.plain_inputs(F.pad(is_image, (0, kept))) if images else {}
        labels = F.pad(completion_ids.masked_fill(mask == 0, -100), (prompt_ids.shape[1], 0), value=-100)
        outputs = network(input_ids=ids, attention_mask=lengths, labels=labels, fused_lm_head=True, **images)
        logps = outputs.log_probs[:, -kept:]
    return logps[mask.bool()].float()


def score_labels(run: Run, rows: Sequence[Row]) -> torch.Tensor:
    """The answer of each row through SFT's collator and model."""
    inputs = run.trainer._prepare_inputs(run.trainer.data_collator(list(rows)))
    labels = inputs.pop("labels")[:, 1:]
    logits = run.trainer.model(**inputs).logits[:, :-1].float()
    return selective_log_softmax(logits, labels.clamp(min=0))[labels != -100]


def difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The mean and the largest difference over all tokens."""
    apart = (one - other).abs()
    return apart.mean().item(), apart.max().item()


@dataclass(eq=False)
class Scores:
    """Scores of the two examples that several checks compare, made when first asked for."""

    run: Run

    @cached_property
    def rows(self) -> list[Row]:
        """The examples, if scoring them does not take too long; else Missing."""
        rows, run = questions(self.run), self.run
        if run.on_cpu:
            kwargs = run.template_kwargs
            tokens = sum(count_prompt_tokens(row, run.processor, **kwargs) for row in rows)
            images = sum(len(row["images"]) for row in rows)
            # a short and a long completion of each, in a plain forward pass each with its prompt
            seconds = PASSES * run.flops(2 * tokens, 2 * images) / run.speed
            if seconds > SECONDS:
                minutes = f"{seconds / 60:.0f} minutes"
                raise Missing(f"scoring would take this CPU about {minutes}; check this on a GPU")
        return rows

    @cached_property
    def usual(self) -> torch.Tensor:
        """Each by itself, in a plain forward pass."""
        return torch.cat([score(self.run, [row], shared=False) for row in self.rows])

    @cached_property
    def exact(self) -> torch.Tensor:
        """The same with every number in float32."""
        with InFloat32(self.run.trainer.accelerator.device):
            return torch.cat([score(self.run, [row], shared=False) for row in self.rows])

    @cached_property
    def as_trained(self) -> torch.Tensor:
        """In a batch, as the recipe says."""
        return score(self.run, self.rows)

    @cached_property
    def rounding(self) -> float:
        """Mean distance of the usual scores from the exact ones, in nats; 0 in float32."""
        if not rounds(self.run):
            return 0.0
        return difference(self.usual, self.exact)[0]

    @property
    def bound(self) -> float:
        """How far the mean of scores may be from the exact ones."""
        return max(FLOOR, MULTIPLE * self.rounding)

    def compare(self, scores: torch.Tensor, what: str, remedy: str) -> Finding:
        """Whether scores are as exact as the usual ones."""
        mean, most = difference(scores, self.exact if rounds(self.run) else self.usual)
        against = f" from float32 ({self.rounding:.1e} by rounding)" if rounds(self.run) else ""
        what = f"{what}: log-probabilities differ by {mean:.1e}{against}, {most:.1e} at most"
        return passed(what) if mean <= self.bound else failed(what, remedy)  # NaN is not


@lru_cache(maxsize=1)
def scores_of(run: Run) -> Scores:
    """The one object that the checks of a run share."""
    return Scores(run)


def rounds(run: Run) -> bool:
    """Whether it computes in 16 bits."""
    return plain_model(run).dtype in SHORT or run.args.bf16 or run.args.fp16


def weights(run: Run) -> Iterator[Finding]:
    """The model is loaded as the run loads it; its dtype, device and attention are printed."""
    model = plain_model(run)
    yield passed(f"{model.dtype} on {model.device}, attention {model.config._attn_implementation}")


def image_tokens(run: Run) -> Iterator[Finding]:
    """As many places in the prompt as the vision tower has features, and as data are counted with."""
    row = questions(run)[-1]
    if not row["images"]:
        yield skipped(f"no image in the first {TRIED} rows")
        return
    prompt, family = encode(run, row), family_of(plain_model(run))
    places = int((prompt.input_ids == run.processor.image_token_id).sum())
    with torch.no_grad():
        features = family.feature_tensors(family.encode_images(plain_model(run), prompt.image_inputs))
    encoded = sum(len(image) for image in features[: len(row["images"])])
    counted = family.count_image_tokens(run.processor, [(image.height, image.width) for image in row["images"]])
    what = f"{len(row['images'])} images: {places} tokens, {encoded} features, {counted} counted"
    if places == encoded == counted:
        yield passed(what)
    else:
        yield failed(what, "patch_size and merge_size are another model's: load model and processor from one folder")


def batching(run: Run) -> Iterator[Finding]:
    """Neighbours in a batch, and the padding that they bring, change nothing."""
    scores = scores_of(run)
    remedy = "padding changes the scores: try --attn_implementation sdpa"
    yield scores.compare(score(run, scores.rows, shared=False), "two prompts in a batch", remedy)


def reference(run: Run) -> Iterator[Finding]:
    """KL is 0 before the first step."""
    if not run.is_grpo or run.args.beta == 0:
        return
    scores, trainer = scores_of(run), run.trainer
    if trainer.ref_model is not None:
        referred = score(run, scores.rows, model=trainer.ref_model)
    else:
        with use_adapter(trainer.model, None):
            referred = score(run, scores.rows)
    mean, most = difference(scores.as_trained, referred)
    what = "policy and reference, before the first step: log-probabilities differ by "
    what += f"{mean:.1e}, {most:.1e} at most"
    remedy = "they have different weights: some are missing in the model's files"
    yield passed(what) if mean <= FLOOR else failed(what, remedy)


def sight(run: Run) -> Iterator[Finding]:
    """A grey picture in place of each image changes the answers."""
    scores = scores_of(run)
    if not scores.rows[-1]["images"]:
        yield skipped(f"no image in the first {TRIED} rows")
        return
    grey = [{**row, "images": [Image.new("RGB", image.size, "grey") for image in row["images"]]} for row in scores.rows]
    mean, most = difference(scores.as_trained, score(run, grey))
    what = f"grey images change log-probabilities by {mean:.1e}, {most:.1e} at most"
    remedy = "the vision tower's weights have no effect, or this model does not use images"
    if mean > scores.bound:
        yield passed(what)
    else:
        yield warned(what, remedy) if mean > UNSEEN else failed(what, remedy)


def shared_prefix(run: Run) -> Iterator[Finding]:
    """The packed groups of this project against completions that each have their prompt."""
    if not run.is_grpo:
        return
    if not run.trainer.shared_prefix:
        yield skipped("the recipe turns shared_prefix off")
        return
    scores = scores_of(run)
    what, remedy = "shared prefix against a plain forward pass", "train with --shared_prefix false"
    yield scores.compare(scores.as_trained, what, remedy)


# image_tokens first: a forward pass would end in the middle where these do not fit
CHECKS: Checks = (weights, image_tokens, batching, reference, sight, shared_prefix)
