"""Checks a model's log-probabilities on a few examples: what must not change them, and what must."""

from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import is_peft_model
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl.trainer.utils import selective_log_softmax, use_adapter

from open_r1.base.images import open_image
from open_r1.doctor.finding import Checks, Finding, failed, passed, skipped, warned
from open_r1.doctor.subject import Patient
from open_r1.engines.shared_prefix import Prompt, encode_prompt
from open_r1.models.families import family_of
from open_r1.running.data import Row, count_prompt_tokens
from open_r1.trainer.rows import with_images_inside
from open_r1.trainer.trainer import Scored

TRIED = 32  # rows among which the shortest and the longest prompt are taken
# By what a number computed in another order may differ in the mean over tokens.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
UNSEEN = 1e-6  # a difference between two images that is none

Scores = list[torch.Tensor]  # of each completion, log-probabilities of its tokens


def questions(patient: Patient) -> list[Row]:
    """Two examples with images, decoded: those with the shortest and the longest prompt; of texts alone likewise."""
    rows, processor = patient.prepared_data["train_dataset"], patient.prepared_data["processing_class"]
    tried = [rows[index] for index in range(min(TRIED, len(rows)))]
    tried = [row for row in tried if row["images"]] or tried
    tried.sort(key=lambda row: count_prompt_tokens(row, processor, **patient.template_kwargs))
    return [{**row, "images": [open_image(image) for image in row["images"]]} for row in (tried[0], tried[-1])]


def encode(patient: Patient, row: Row) -> Prompt:
    """A question as the run encodes it."""
    model, prompt = plain_model(patient), with_images_inside(row)["prompt"]
    return encode_prompt(model, patient.prepared_data["processing_class"], prompt, **patient.template_kwargs)


def plain_model(patient: Patient) -> PreTrainedModel:
    """The policy without an adapter around it."""
    model = patient.trainer.model
    return model.get_base_model() if is_peft_model(model) else model


def score(
    patient: Patient, rows: Sequence[Row], shared: bool | None = None, model: torch.nn.Module | None = None
) -> Scores:
    """Log-probabilities of right answers, computed as the run's trainer does, in one batch.

    Args:
        rows: examples with decoded images.
        shared: whether completions share their prompt; None: as the recipe says.
        model: in place of the policy.
    """
    with torch.no_grad():
        return score_completions(patient, rows, shared, model) if patient.is_grpo else score_labels(patient, rows)


def score_completions(
    patient: Patient, rows: Sequence[Row], shared: bool | None, model: torch.nn.Module | None
) -> Scores:
    """A short and a long completion of each row through GRPO's trainer."""
    trainer, processor = patient.trainer, patient.prepared_data["processing_class"]
    tokenizer, device = processor.tokenizer, trainer.accelerator.device
    texts = [
        text
        for row in rows
        for answer in [f"<answer>{row['solution'] or 'yes'}</answer>"]
        for text in (answer, f"I look at the picture, and look again.</think>\n{answer}")
    ]
    completions = [torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in texts]
    prompts = [prompt for row in rows for prompt in [encode(patient, row)] * 2]

    def pad(tensors: list[torch.Tensor], side: str, value: int = 0) -> torch.Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side).to(device)

    def join(prompts: torch.Tensor, completions: torch.Tensor) -> torch.Tensor:
        return torch.cat([prompts, completions], dim=1)

    prompt_ids = pad([prompt.input_ids for prompt in prompts], "left", tokenizer.pad_token_id)  # (B, P)
    prompt_mask = pad([torch.ones_like(prompt.input_ids) for prompt in prompts], "left")
    completion_ids = pad(completions, "right", tokenizer.pad_token_id)  # (B, C)
    mask = pad([torch.ones_like(ids) for ids in completions], "right")
    if trainer.shared_prefix if shared is None else shared:
        images = {"pixel_values": Scored(prompts)}
    elif not rows[0]["images"]:
        images = {}
    else:
        family, inputs = family_of(plain_model(patient)), [prompt.image_inputs for prompt in prompts]
        is_image = join((prompt_ids == processor.image_token_id).long(), torch.zeros_like(completion_ids))
        images = {**family.join_images(inputs, device), **family.stock_inputs(inputs, is_image)}
        images["num_images"] = [len(row["images"]) for row in rows for _ in range(2)]
    logps, _, _ = trainer._get_per_token_logps_and_entropies(
        model or trainer.model,
        join(prompt_ids, completion_ids),
        join(prompt_mask, mask),
        completion_ids.shape[1],
        **images,
    )
    return [row[: len(ids)].float() for row, ids in zip(logps, completions, strict=True)]


def score_labels(patient: Patient, rows: Sequence[Row]) -> Scores:
    """The answer of each row through SFT's collator and model."""
    inputs = patient.trainer._prepare_inputs(patient.trainer.data_collator(list(rows)))
    labels = inputs.pop("labels")[:, 1:]
    logits = patient.trainer.model(**inputs).logits[:, :-1].float()
    logps = selective_log_softmax(logits, labels.clamp(min=0))
    return [row[label != -100] for row, label in zip(logps, labels, strict=True)]


def difference(some: Scores, others: Scores) -> tuple[float, float]:
    """The mean and the largest difference over all tokens."""
    apart = (torch.cat(some) - torch.cat(others)).abs()
    return apart.mean().item(), apart.max().item()


def tolerance(patient: Patient) -> float:
    """For the coarsest numbers that the run computes with."""
    args = patient.settings[1]
    mixed = {torch.bfloat16} if args.bf16 else {torch.float16} if args.fp16 else set()
    return max(TOLERANCES.get(dtype, 0) for dtype in {plain_model(patient).dtype, torch.float32} | mixed)


def compare(patient: Patient, some: Scores, others: Scores, what: str, remedy: str) -> Finding:
    """Whether scores that should be the same are."""
    mean, most = difference(some, others)
    what = f"{what}: log-probabilities differ by {mean:.1e}, {most:.1e} at most"
    return passed(what) if mean <= tolerance(patient) else failed(what, remedy)  # NaN is not


def weights(patient: Patient) -> Iterator[Finding]:
    """They are loaded as the run loads them."""
    model = plain_model(patient)
    yield passed(f"{model.dtype} on {model.device}, attention {model.config._attn_implementation}")


def image_tokens(patient: Patient) -> Iterator[Finding]:
    """As many places in the prompt as the vision tower has features, and as the data were measured with."""
    row, processor = questions(patient)[-1], patient.prepared_data["processing_class"]
    if not row["images"]:
        yield skipped(f"no image in the first {TRIED} rows")
        return
    prompt, family = encode(patient, row), family_of(plain_model(patient))
    places = int((prompt.input_ids == processor.image_token_id).sum())
    with torch.no_grad():
        features = family.feature_tensors(family.encode_images(plain_model(patient), prompt.image_inputs))
    given = sum(len(image) for image in features[: len(row["images"])])
    counted = family.count_image_tokens(processor, [(image.height, image.width) for image in row["images"]])
    what = f"{len(row['images'])} images: {places} tokens, {given} features, {counted} counted"
    if places == given == counted:
        yield passed(what)
    else:
        yield failed(what, "the processor's patch_size and merge_size are another model's: take both from one folder")


def batching(patient: Patient) -> Iterator[Finding]:
    """Neighbours in a batch, and the padding that they bring, change nothing."""
    rows = questions(patient)
    alone = [scores for row in rows for scores in score(patient, [row], shared=False)]
    remedy = "padding leaks into the numbers: try --attn_implementation sdpa"
    yield compare(patient, score(patient, rows, shared=False), alone, "two prompts in a batch or alone", remedy)


def reference(patient: Patient) -> Iterator[Finding]:
    """KL is 0 before the first step."""
    args = patient.settings[1]
    if not patient.is_grpo or args.beta == 0:
        return
    rows, trainer = questions(patient), patient.trainer
    policy = score(patient, rows)
    if trainer.ref_model is not None:
        referred = score(patient, rows, model=trainer.ref_model)
    else:
        with use_adapter(trainer.model, None):
            referred = score(patient, rows)
    remedy = "they start from different weights: some are missing in the model's files"
    yield compare(patient, policy, referred, "policy and reference, before the first step", remedy)


def sight(patient: Patient) -> Iterator[Finding]:
    """A grey picture in place of each image changes the answers."""
    rows = questions(patient)
    if not rows[-1]["images"]:
        yield skipped(f"no image in the first {TRIED} rows")
        return
    grey = [{**row, "images": [Image.new("RGB", image.size, "grey") for image in row["images"]]} for row in rows]
    mean, most = difference(score(patient, rows), score(patient, grey))
    what = f"grey images change log-probabilities by {mean:.1e}, {most:.1e} at most"
    remedy = "the vision tower's weights are dead, or this model does not look at images"
    if mean > tolerance(patient):
        yield passed(what)
    else:
        yield (warned if mean > UNSEEN else failed)(what, remedy)


def shared_prefix(patient: Patient) -> Iterator[Finding]:
    """The packed groups of this project against TRL's own path."""
    if not patient.is_grpo:
        return
    if not patient.trainer.shared_prefix:
        yield skipped("the recipe turns it off")
        return
    rows = questions(patient)
    packed, usual = score(patient, rows, shared=True), score(patient, rows, shared=False)
    yield compare(patient, packed, usual, "shared prefix against TRL's path", "train with --shared_prefix false")


CHECKS: Checks = {
    "weights": weights,
    "image tokens": image_tokens,  # first: a forward pass would end in the middle where these do not fit
    "batching": batching,
    "reference": reference,
    "sight": sight,
    "shared prefix": shared_prefix,
}
