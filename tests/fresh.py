"""What a newcomer starts from: a fresh clone, and a shell in which nothing is active."""

import os
import shutil
import subprocess
from pathlib import Path

from open_r1.base.errors import REPO_ROOT

SYSTEM_PATH = "/usr/bin:/bin"  # no uv and no environment on it
_ACTIVE = (
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "PYTHON",
    "PYTHONPATH",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "TORCH_EXTENSIONS_DIR",
)


def new_shell(path: str = SYSTEM_PATH, **env: str) -> dict[str, str]:
    """This process's environment (proxies, certificates, package indexes) with nothing active."""
    kept = {name: value for name, value in os.environ.items() if name not in _ACTIVE}
    return {**kept, "PATH": path, **env}


def clone(folder: Path) -> Path:
    """The files of this repository, committed or not, as a clone has them."""
    listed = ["git", "-C", str(REPO_ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.check_output(listed, text=True).split("\0")):
        if (REPO_ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPO_ROOT / name, folder / name)
    return folder
