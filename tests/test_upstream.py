"""What `engines/` and `models/` build on below the documented interfaces of libraries is what it was when written."""

import hashlib
import importlib
import inspect
from functools import reduce

import pytest

# A part of a library, who of ours relies on it, and the hash of its source. Where one fails: read the new source, change
# what relies on it if need be, and write the new hash here.
PARTS = {
    "transformers.generation.utils:GenerationMixin._prepare_generation_config": ("decoding.generate", "e31e7ac9816ecf01"),
    "transformers.cache_utils:DynamicLayer": ("decoding.RoomyLayer", "56c0a116b1284680"),
    "transformers.cache_utils:LinearAttentionLayer": ("recurrent.Carried", "fd94274b4546d2c5"),
    "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5GatedDeltaNet.forward": ("recurrent.run_packed", "bd25761e1031fff0"),
    "transformers.models.qwen2_vl.modeling_qwen2_vl:VisionAttention.forward": ("shared_prefix.image_attention", "2afc2f9fa3ebd677"),
    "peft.tuners.lora.variants:DoraLinearVariant.merge_safe": ("vllm_backends.merged_weight", "67ef9bea516aeff0"),
    "trl.generation.vllm_generation:VLLMGeneration._iter_named_params": ("vllm_backends.adapted_weights", "baab615d5c7bc3e1"),
    "trl.generation.vllm_generation:VLLMGeneration._fix_param_name_to_vllm": ("vllm_backends.adapted_weights", "c42c3965795e12dc"),
    "trl.generation.vllm_generation:VLLMGeneration.sync_weights": ("vllm_backends.adapted_weights", "63d669fb32304ff5"),
    "trl.generation.vllm_generation:VLLMGeneration.generate": ("vllm_backends.TrainerVLLMBackend", "2d2ac2be5b1309c4"),
}


def digest(name: str) -> str:
    module, _, path = name.partition(":")
    part = reduce(getattr, path.split("."), importlib.import_module(module))
    return hashlib.sha256(inspect.getsource(part).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_library_is_what_we_take_it_for(name):
    relies, known = PARTS[name]
    assert digest(name) == known, f"{name} has changed; see open_r1.engines.{relies}"
