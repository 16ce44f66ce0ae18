"""How a launch splits a run: over how many processes and machines, and by which stage of DeepSpeed's ZeRO."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate import DistributedType
from accelerate.commands.config import load_config_from_file

from open_r1.base.errors import Mistake


@dataclass(frozen=True)
class Launch:
    """How many processes (one a GPU) run, ZeRO's stage (0: none), and on how many machines.

    Every machine has as many of the processes.
    """

    num_processes: int = 1
    zero_stage: int = 0
    num_machines: int = 1

    def __str__(self) -> str:
        if not self.zero_stage:
            return "a launch without ZeRO"
        return f"{self.num_processes} process{'es' if self.num_processes > 1 else ''} under ZeRO-{self.zero_stage}"

    @classmethod
    def of_deepspeed(cls, num_processes: int, zero_stage: str | int | None, config_file: str | None) -> "Launch":
        """From what accelerate is told of DeepSpeed: a stage, or DeepSpeed's own file with it."""
        if config_file:
            zero_stage = json.loads(Path(config_file).read_text())["zero_optimization"]["stage"]
        stage = 2 if zero_stage is None else int(zero_stage)
        return cls(num_processes, 2 if stage == 1 else stage)  # the files of 1 and 2 are alike

    @classmethod
    def of_this_process(cls) -> "Launch":
        """The one which started this process."""
        num_processes = int(os.environ.get("WORLD_SIZE", 1))
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
            return cls(num_processes)
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return cls.of_deepspeed(num_processes, stage, os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))

    @classmethod
    def of_config(cls, path: str, num_processes: int) -> "Launch":
        """One with a configuration file of accelerate's; Mistake for a file that is none."""
        try:
            config = load_config_from_file(path)
            if config.distributed_type != DistributedType.DEEPSPEED:
                return cls(num_processes)
            stage = config.deepspeed_config.get("zero_stage")
            path_of_its_own = config.deepspeed_config.get("deepspeed_config_file")
            return cls.of_deepspeed(num_processes, stage, path_of_its_own)
        # of a file that is no YAML, no mapping, or one of something else
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, yaml.YAMLError) as error:
            raise Mistake(f"ACCELERATE_CONFIG: {path} does not describe a launch: {error}") from error

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> "Launch | None":
        """The one which wrote a checkpoint, by its files' names; None: only the model.

        Without ZeRO they do not tell the number of processes, which is 0 then.
        """
        parts = list(Path(checkpoint).glob("global_step*/*zero_pp_rank_*_optim_states.pt"))
        if parts:
            split_weights = any(Path(checkpoint).glob("global_step*/*zero_pp_rank_*_model_states.pt"))
            return cls(len(parts), 3 if split_weights else 2)
        has_state = any(Path(checkpoint).glob("optimizer*")) or (Path(checkpoint) / "latest").exists()
        return cls(0) if has_state else None

    @property
    def processes_here(self) -> int:
        """Processes of one machine."""
        return self.num_processes // self.num_machines

    def share(self, amount: float, from_stage: int) -> float:
        """What one GPU holds of an amount that ZeRO splits over the processes from stage `from_stage` on."""
        return amount / self.num_processes if self.zero_stage >= from_stage else amount
