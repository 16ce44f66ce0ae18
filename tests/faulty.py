"""A reward in whose runs things go wrong, each once, at a step of its own: `--reward_funcs faulty:reward`.

What happened is a file in `faults/` beside the run's folder. Other tests never import it: it patches the trainer.
"""

import contextlib
import os
import resource
import signal
from pathlib import Path

from open_r1.running.orphans import LAUNCHER
from open_r1.trainer.trainer import Qwen2VLGRPOTrainer
from support import vowel_share

RUN = Path(os.environ["OUTPUT"])
IMAGE = Path(os.environ["DATA"]).parent / "images/5_0.png"  # the one that is damaged


def happens(fault: str, step: int, at: int, rank: int) -> bool:
    """Whether it is time for a fault in this process, which it is once."""
    if step != at or int(os.environ["RANK"]) != rank:
        return False
    (RUN.parent / "faults").mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (RUN.parent / "faults" / fault).touch(exist_ok=False)
        return True
    return False


def fill_disk(size: int) -> None:
    """From now on no file of this process can grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def reward(completions, trainer_state, **kwargs):
    """The share of vowels, and the faults of a rollout."""
    step = trainer_state.global_step + 1
    if happens("launcher killed", step, at=45, rank=1):
        os.kill(int(os.environ[LAUNCHER]), signal.SIGKILL)
    if happens("rank killed", step, at=85, rank=0):
        os.kill(os.getpid(), signal.SIGKILL)
    if happens("disk full of rows", step, at=105, rank=0):
        fill_disk((RUN / "trajectories/train.jsonl").stat().st_size + 500)  # less than a row more
    if happens("image damaged", step, at=170, rank=0):
        IMAGE.write_bytes(IMAGE.read_bytes()[:60])
    return vowel_share(completions)


save_checkpoint = Qwen2VLGRPOTrainer._save_checkpoint


def save_on_a_full_disk(self, *args, **kwargs):
    """A checkpoint, of which half fits."""
    if happens("disk full of checkpoints", self.state.global_step, at=160, rank=0):
        fill_disk(50_000)
    save_checkpoint(self, *args, **kwargs)


Qwen2VLGRPOTrainer._save_checkpoint = save_on_a_full_disk
