"""What scripts that users call by their path share: the right Python, whatever `python` they typed, and short errors.

Such a front door puts this package's folder on `sys.path`, calls `use_environment()` and only then imports what
`setup.sh` installed. Any Python 3 must be able to read this file, and it needs nothing installed.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROBE = "trl"  # nothing else brings it: whoever has it has what setup.sh installs
CHOSEN = "OPEN_R1_PYTHON"  # environment variable: the Python that the script was started anew with


def first_line(error: BaseException) -> str:
    """What an error says in its first line; libraries go on to explain it in paragraphs."""
    return str(error).strip().split("\n")[0]


def use_environment() -> None:
    """Go on when this Python has the packages; else start the script anew with the environment's Python.

    The active environment (virtual or conda) wins over the `.venv` of `setup.sh`, as in `scripts/env.sh`.

    Raises:
        SystemExit: no environment, or one without the packages; in one line.
    """
    started = os.environ.pop(CHOSEN, None)
    if importlib.util.find_spec(PROBE):
        return
    environments = (os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), str(ROOT / ".venv"))
    pythons = [os.path.join(folder, "bin", "python") for folder in environments if folder]
    python = next((python for python in pythons if os.access(python, os.X_OK)), None)
    if python is None or python == started:
        sys.exit(
            f"error: {python or sys.executable} does not have this repository's packages; run `bash setup.sh` in {ROOT}"
        )
    arguments = getattr(sys, "orig_argv", [sys.executable, *sys.argv])[1:]  # Python 3.10 knows -X and -m too
    os.execve(python, [python, *arguments], {**os.environ, CHOSEN: python})
