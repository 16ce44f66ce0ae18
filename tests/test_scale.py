"""The main figures of docs/scale.md follow from the formulas that it shows, and its counts are the model's."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, GenerationConfig
from trl import ModelConfig

from benchmarks.published import TEXT, VISION, make_2b_config
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.configs import FreezeArguments
from open_r1.engines import attention
from open_r1.engines.decoding import generate
from open_r1.engines.shared_prefix import Prompt
from open_r1.models.families import family_of
from open_r1.models.memory import build_model
from open_r1.settings.processes import Launch
from open_r1.settings.recipes import merge_recipes
from open_r1.tiny import make_tokenizer

LAYER = 2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960
BODY, HEAD = 28 * LAYER, 151_936 * 1536
TOWER, MERGER = 32 * (4 * 1280**2 + 2 * 1280 * 5120) + 1176 * 1280, 5120**2 + 5120 * 1536
PARAMETERS = BODY + HEAD + TOWER + MERGER
FLOPS, MEMORY, NVLINK = 0.4 * 989e12, 0.6 * 3.35e12, 0.8 * 450e9
PROMPT, PATCHES, COMPLETION, LONGEST = 450, 1296, 200, 700


def image_flops(patches: float) -> float:
    return 2 * patches * (TOWER + MERGER / 4) + 4 * 32 * 1280 * patches**2


def decoder_flops(new: float, before: float = 0) -> float:
    return 2 * new * BODY + 4 * 28 * 1536 * new * (before + new / 2)


IMAGE, PREFILL = image_flops(PATCHES), decoder_flops(PROMPT)
SCORED = decoder_flops(COMPLETION, PROMPT) + 2 * COMPLETION * HEAD
SHARED, REPEATED = 8 * (IMAGE + PREFILL) + 64 * SCORED, 64 * (IMAGE + PREFILL + SCORED)


@pytest.fixture(scope="module")
def cells() -> dict[str, list[str]]:
    """The rows of the page's tables: first cell -> the others; bold is plain."""
    page = (REPO_ROOT / "docs/scale.md").read_text().replace("**", "")
    return {name: rest for name, *rest in (line[2:-1].split(" | ") for line in page.splitlines() if line[:1] == "|")}


def test_sizes_and_forward_passes(cells):
    sizes = {"28 layers": BODY, "head": HEAD, "32 blocks": TOWER, "merger": MERGER, "all": PARAMETERS}
    for name, value in sizes.items():
        [row] = [rest for first, rest in cells.items() if first.startswith(name) and rest[-1].strip().endswith(" B")]
        assert row[-1].strip() == f"{value / 1e9:.3f} B"
    for name, value in {"an image": IMAGE, "a prompt": PREFILL, "a completion": SCORED}.items():
        assert cells[name][-1].strip() == f"{value / 1e12:.2f}"
    for name, value in {"once a group": SHARED, "once each": REPEATED}.items():
        assert cells[f"64 completions, prompt {name}"][-1].strip() == f"{value / 1e12:.0f}"


def test_seconds_of_a_step_on_8_gpus(cells):
    """One micro-batch of the step on each."""
    terms = {
        "images and prefill": 8 * (IMAGE + PREFILL) / FLOPS / 8,
        "reference": SHARED / FLOPS / 8,
        "policy": 4 * SHARED / FLOPS / 8,
        "optimiser": PARAMETERS * 30 / MEMORY / 8,
        "ZeRO-2's traffic": 2 * 2 * PARAMETERS * (1 - 1 / 8) / NVLINK,
    }
    for name, seconds in terms.items():
        assert cells[name][2].strip() == f"{seconds:.3f}"
    others = sum(terms.values())
    repeated = others + (5 * (REPEATED - SHARED) + 56 * (IMAGE + PREFILL)) / FLOPS / 8
    assert cells["all but decoding"][2].strip() == f"{others:.2f}"
    assert cells["all but decoding, prompt once each"][2].strip() == f"{repeated:.2f}"
    fast, slow = (others + LONGEST * token for token in (0.003, 0.004))
    assert cells["step, vLLM"][2].strip() == f"{fast:.1f} to {slow:.1f}"
    recipe = merge_recipes([str(REPO_ROOT / "configs/grpo_sat.yaml")])
    names = ("completions_per_step", "num_generations", "per_device_train_batch_size", "max_completion_length")
    assert [recipe[name] for name in names] == [64, 8, 8, LONGEST]


# --- the model's own counts -----------------------------------------------------------------------


def test_parameters_and_multiplications_are_the_models():
    """Parameters but for norms and biases; torch's count of a forward pass but for attention, whose pairs are ours."""
    config = make_2b_config(make_tokenizer(["a text"]))
    model = build_model(config, ModelConfig(dtype="bfloat16"), FreezeArguments(), Launch())
    family = family_of(model)
    for counted, module in ((PARAMETERS, model), (TOWER + MERGER, family.vision_tower(model))):
        matrices = sum(p.numel() for p in module.parameters() if p.ndim > 1)
        assert counted == matrices and matrices / sum(p.numel() for p in module.parameters()) > 0.999
    tokens, patches = 96, 64
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        positions = torch.zeros(3, 1, tokens, dtype=torch.long)
        embedded = torch.empty(1, tokens, 1536, dtype=torch.bfloat16)
        model.get_decoder()(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        decoder = counter.get_total_flops()
        family.run_tower(model, patches, torch.bfloat16)
        tower = counter.get_total_flops() - decoder
    # scores and sums, a multiplication and an addition each, over the size of a head; half of all pairs see each other
    attended = 28 * 12 * tokens**2 / 2 * 2 * 2 * 128
    assert decoder_flops(tokens) - attended == pytest.approx(decoder, rel=1e-4)
    assert image_flops(patches) - 32 * 16 * patches**2 * 4 * 80 == pytest.approx(tower, rel=1e-4)


VIEWS = {  # operations that launch nothing
    *("view", "_unsafe_view", "expand", "select", "slice", "unsqueeze", "transpose", "t", "split", "split_with_sizes"),
    *("alias", "detach", "empty", "empty_like", "_local_scalar_dense"),
}


class Kernels(TorchDispatchMode):
    """Counts operations that launch a kernel; of what is read from the meta device, all is true or many."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1000
        self.count += name not in VIEWS
        return function(*args, **kwargs or {})


def test_kernels_of_a_token_are_the_models(monkeypatch):
    """Of a layer but for attention itself, and of what is around the layers."""
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda query, *args, **kwargs: query)
    prompts = [Prompt(torch.arange(3, 3 + n), torch.arange(n).expand(3, n)) for n in (5, 9)]
    settings = {"do_sample": True, "top_k": 0, "eos_token_id": [1], "suppress_tokens": [2], "pad_token_id": 0}

    def kernels(layers: int) -> int:
        text, vision = TEXT | {"num_hidden_layers": layers}, VISION | {"depth": 1}
        config = make_2b_config(make_tokenizer(["a text"]), text, vision)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        counts = []
        model.register_forward_pre_hook(lambda *args: counts.append(counted.count))
        with Kernels() as counted, pytest.raises(Mistake):  # as "was there any NaN?" is true
            generate(model, prompts, [2, 2], GenerationConfig(max_new_tokens=5, **settings))
        return counts[-1] - counts[-2]

    two, three = kernels(2), kernels(3)
    assert (three - two, two - 2 * (three - two)) == (40, 36)
