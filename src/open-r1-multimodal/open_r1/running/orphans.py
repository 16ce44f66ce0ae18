"""Ends the processes of a launch with their launcher, even when that is killed (Linux).

Elsewhere they go on after the launcher's SIGKILL, and hold the lock of their OUTPUT until they end.
"""

import ctypes
import os
import signal
import sys

LAUNCHER = "OPEN_R1_LAUNCHER"  # environment variable with the process id of the launcher
PR_SET_PDEATHSIG = 1


def lead() -> None:
    """Be the launcher of the processes that this one is going to start."""
    os.environ[LAUNCHER] = str(os.getpid())


def follow_launcher() -> None:
    """Have the kernel end this process when its parent ends; and end it now if the launcher is gone already."""
    if LAUNCHER not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(int(os.environ[LAUNCHER]), 0)
    except ProcessLookupError:
        sys.exit("the launcher was killed")
