"""Plants the written rollout in the process that imports it, as a launched run does with its reward:
`--reward_funcs accuracy planting:zero`. For such runs only: in the tests' own process it would stay planted.
"""

from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from planted import Written

make_backend = Qwen2VLGRPOTrainer.make_backend
Qwen2VLGRPOTrainer.make_backend = lambda self, keep_features: Written(make_backend(self, keep_features))


def zero(completions, **kwargs):
    """A reward that is there for its import."""
    return [0.0] * len(completions)
