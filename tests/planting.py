"""Plants the written rollout in the process that imports it, as a launched run does with its reward:
`--reward_funcs accuracy planting:zero`. For such runs only: in the tests' own process it would stay planted.
"""

from open_r1 import trainer
from planted import generate

trainer.generate = generate


def zero(completions, **kwargs):
    """A reward that is there for its import."""
    return [0.0] * len(completions)
