"""Keeps the processes of several machines together: one decides for all, in one shared folder."""

import os
import platform
import time
from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from open_r1.base.errors import Mistake
from open_r1.base.locks import holder

T = TypeVar("T")
SEEN_SECONDS = 60  # after which NFS shows a new file to all machines (acdirmax)


def decide_once(decide: Callable[[], T]) -> T:
    """Call `decide` in the main process, and give its result to every one: each may see another state of a folder.

    Raises:
        Mistake: in all processes, for what `decide` raises as Mistake or OSError in the main one.
    """
    outcome: list = [None]
    if PartialState().is_main_process:
        try:
            outcome = [decide()]
        except (Mistake, OSError) as error:
            outcome = [Mistake(error)]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Mistake):
        raise outcome[0]
    return outcome[0]


def check_shared(folder: str) -> None:
    """See that on every machine this is the folder that the main process holds the lock of.

    Raises:
        Mistake: in all processes; it names a machine on which it is another.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # launchers that torch has brought together
        return
    owner, main = decide_once(lambda: (holder(folder), platform.node()))
    deadline = time.monotonic() + SEEN_SECONDS
    while holder(folder) != owner and time.monotonic() < deadline:
        time.sleep(1)
    stranger = platform.node() if holder(folder) != owner else ""
    strangers = [name for name in gather_object([stranger]) if name]
    if strangers:
        raise Mistake(
            f"{folder}: on {strangers[0]} this is not the folder that {main} writes; the machines of "
            "a run need an OUTPUT on a file system that they share"
        )
