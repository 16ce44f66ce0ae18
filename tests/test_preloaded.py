"""The Python that tests start scripts with, `preloaded.py`, ends as Python does."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "code",
    [
        "print('said', end='')",
        "import sys; print('told', end='', file=sys.stderr)",
        "raise SystemExit(3)",
        "raise SystemExit('error: no such file')",
        "raise SystemExit(None)",
        "1 / 0",
        "raise KeyboardInterrupt",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import atexit; atexit.register(print, 'last'); 1 / 0",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
        "import os; os._exit(7)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    ],
)
def test_exit_code_and_last_words(code, quick_python):
    ends = []
    for python in (sys.executable, quick_python):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        ends.append((done.returncode, done.stdout, done.stderr.splitlines()[-1:]))
    assert ends[0] == ends[1]
