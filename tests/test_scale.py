"""The arithmetic of docs/scale.md is the script's, and the script's is the model's."""

import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trl import ModelConfig

from open_r1.configs import FreezeArguments
from open_r1.families import family_of
from open_r1.memory import Launch, build_model
from open_r1.prompts import REPO_ROOT
from open_r1.published import make_2b_config
from open_r1.tiny import make_tokenizer


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(REPO_ROOT / "scripts"))
    import scale

    return scale


@pytest.fixture(scope="module")
def published():
    """Qwen2-VL-2B without numbers; its attention multiplies nothing."""
    config = make_2b_config(make_tokenizer(["a text"]))
    return build_model(config, ModelConfig(dtype="bfloat16"), FreezeArguments(), Launch())


def test_the_page_shows_what_the_script_computes(scale):
    page = (REPO_ROOT / "docs/scale.md").read_text()
    tables = scale.tables().split("\n\n")
    assert len(tables) == 3 and all(table in page for table in tables)


def test_parameters_are_the_models(scale, published):
    """All but norms and biases."""
    model = scale.qwen2_vl_2b()
    vision = family_of(published).vision_tower(published)
    for counted, module in ((model.parameters, published), (model.tower + model.merger, vision)):
        matrices = sum(p.numel() for p in module.parameters() if p.ndim > 1)
        assert counted == matrices and matrices / sum(p.numel() for p in module.parameters()) > 0.999
    assert model.language / 1e9 == pytest.approx(1.54, abs=0.01) and model.parameters / 1e9 == pytest.approx(2.21, 0.01)


def test_multiplications_are_the_models(scale, published):
    """torch's count of a forward pass without attention, whose pairs are counted by hand."""
    model = scale.qwen2_vl_2b()
    tokens, patches = 96, 64
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        positions = torch.zeros(3, 1, tokens, dtype=torch.long)
        embedded = torch.empty(1, tokens, model.hidden, dtype=torch.bfloat16)
        published.get_decoder()(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        decoder = counter.get_total_flops()
        family_of(published).run_tower(published, patches, torch.bfloat16)
        tower = counter.get_total_flops() - decoder
    seen = sum(1 for row in range(tokens) for column in range(tokens) if column <= row)
    heads = 28 * 12
    attended = heads * seen * 2 * 2 * 128  # scores and sums, a multiplication and an addition, over the head's size
    rotary = counter.get_flop_counts().get("Qwen2VLRotaryEmbedding", {})
    assert not rotary
    assert scale.decoder_flops(model, tokens) - attended == pytest.approx(decoder, rel=1e-4)
    assert scale.encode_flops(model, patches) - 32 * 16 * patches**2 * 4 * 80 == pytest.approx(tower, rel=1e-4)
    cached = scale.decoder_flops(model, 10, before=tokens) + scale.decoder_flops(model, tokens)
    assert cached == pytest.approx(scale.decoder_flops(model, tokens + 10))


def test_more_gpus_share_the_work_and_not_the_weights_that_are_read(scale):
    model, machine = scale.qwen2_vl_2b(), scale.Machine()
    work, batch = scale.recipe_work(8)
    assert (work.completions, work.group, work.longest, batch) == (64, 8, 700, 8)  # the recipe's
    one, eight = (scale.step(model, machine, work, gpus, batch) for gpus in (1, 8))
    assert eight.policy == pytest.approx(one.policy / 8) and one.zero2 == 0
    weights = machine.move(2 * model.language * 700)
    assert one.decode > eight.decode > weights
    assert scale.step(model, machine, work, 1, batch, shared=False).decode == one.decode  # decoding shares nothing
