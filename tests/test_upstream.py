"""What `engines/` builds on below the documented interfaces of libraries is what it was when it was written."""

import hashlib
import importlib
import inspect
from functools import reduce

import pytest

# By who relies on it, parts of a library with the hash of their source. Where one fails: read the new source, change
# what relies on it if need be, and write the new hash here.
PARTS = {
    "decoding": {
        "transformers.generation.utils:GenerationMixin._prepare_generation_config": "e31e7ac9816ecf01",
        "transformers.cache_utils:DynamicLayer": "56c0a116b1284680",
    },
    "recurrent": {
        "transformers.cache_utils:LinearAttentionLayer": "fd94274b4546d2c5",
        "transformers.models.qwen3_5.modeling_qwen3_5:Qwen3_5GatedDeltaNet.forward": "bd25761e1031fff0",
    },
    "shared_prefix": {
        "transformers.models.qwen2_vl.modeling_qwen2_vl:VisionAttention.forward": "2afc2f9fa3ebd677",
    },
    "vllm_backends": {
        "peft.tuners.lora.variants:DoraLinearVariant.merge_safe": "67ef9bea516aeff0",
        "trl.generation.vllm_generation:VLLMGeneration._iter_named_params": "baab615d5c7bc3e1",
        "trl.generation.vllm_generation:VLLMGeneration._fix_param_name_to_vllm": "c42c3965795e12dc",
        "trl.generation.vllm_generation:VLLMGeneration.sync_weights": "63d669fb32304ff5",
        "trl.generation.vllm_generation:VLLMGeneration.generate": "2d2ac2be5b1309c4",
    },
}


@pytest.mark.parametrize("room, name", [(room, name) for room, parts in PARTS.items() for name in parts])
def test_a_part_of_a_library_is_what_we_take_it_for(room, name):
    module, _, path = name.partition(":")
    part = reduce(getattr, path.split("."), importlib.import_module(module))
    digest = hashlib.sha256(inspect.getsource(part).encode()).hexdigest()
    assert digest.startswith(PARTS[room][name]), f"{name} has changed; see open_r1/engines/{room}.py"
