"""GRPO: `trainer.py` has one optimiser step from top to bottom, `advantages.py` the formula of advantages.

It imports `answers`, `base`, `engines`, `models`, `reporting`, `running` and `settings`. Start with
`Qwen2VLGRPOTrainer._take_step`.
"""

from open_r1.configs import Qwen2VLGRPOConfig
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer

__all__ = ["Qwen2VLGRPOConfig", "Qwen2VLGRPOTrainer"]
