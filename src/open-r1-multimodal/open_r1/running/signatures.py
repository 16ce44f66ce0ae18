"""Signs checkpoints with a key of the user's own, so that resuming loads no file of anybody else.

A resume unpickles states of optimizers, schedules and random numbers, and a pickle runs whatever code it holds.
"""

import hashlib
import hmac
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from open_r1.base.errors import FileMistake, Mistake
from open_r1.base.files import replace_file

SIGNATURE = "signature.json"
TRUST = "TRUST_CHECKPOINT"  # environment variable: the one folder that is loaded without a signature of ours
KEY_BYTES = 32
WEIGHTS = ".safetensors"  # numbers and nothing else, and the largest files of most checkpoints: left unsigned
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")  # which a refusal names first; all but weights is signed


def key_path() -> Path:
    """Where the key is kept: in the user's folder for state, never in a run's.

    Raises:
        OSError: there is no home folder.
    """
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        folder = state if state.is_absolute() else Path.home() / ".local/state"
    except RuntimeError as error:
        raise FileMistake(f"{error} (XDG_STATE_HOME names another place for the key)") from error
    return folder / "open-r1-zero/key"


def read_key() -> bytes:
    """The key. The first process that asks for it makes it; of several at once one makes it for all.

    Raises:
        OSError: it cannot be kept or read.
        ValueError: it is damaged.
    """
    path = key_path()
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # for this user's eyes only, as the key is
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(file.name, path)  # whole from the moment it is there
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise Mistake(f"{path}: damaged; delete it (checkpoints signed with it then need {TRUST})")
    return key


def signature_of(digests: Any) -> str:
    """HMAC-SHA256 of {file: SHA-256}, as hexadecimal text. Errors: see `read_key`."""
    return hmac.new(read_key(), json.dumps(digests, sort_keys=True).encode(), hashlib.sha256).hexdigest()


def files_to_sign(checkpoint: Path, but: Iterable[str] = ()) -> list[str]:
    """Every file of a checkpoint that is not weights, pickles first; a link to a folder counts as a file.

    Args:
        checkpoint: the folder.
        but: names of files at its top that are left out.
    """
    found = [path for path in checkpoint.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {str(path.relative_to(checkpoint)) for path in found if path.suffix != WEIGHTS}
    return sorted(names - {SIGNATURE, *but}, key=lambda name: (not name.endswith(PICKLES), name))


def digests_of(checkpoint: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, as hexadecimal text; several are read at a time."""

    def digest(name: str) -> tuple[str, str]:
        with (checkpoint / name).open("rb") as file:
            return name, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        return dict(pool.map(digest, names))


def sign(checkpoint: Path, but: Iterable[str] = ()) -> None:
    """Write the signature of a checkpoint; where no key can be kept, say in a line that it has none.

    Args:
        checkpoint: the folder, with all its files.
        but: names of files at its top that are written later.
    """
    digests = digests_of(checkpoint, files_to_sign(checkpoint, but))
    try:
        record = {"files": digests, "signature": signature_of(digests)}
    except (OSError, Mistake) as error:
        print(f"{checkpoint}: not signed, so that resuming from it will need {TRUST}: {error}", file=sys.stderr)
        return
    replace_file(checkpoint / SIGNATURE, json.dumps(record).encode())


def read_signed(checkpoint: Path) -> dict[str, str] | None:
    """What a checkpoint's signature vouches for, {file: SHA-256}; None when this key made none. Errors: `read_key`."""
    try:
        record = json.loads((checkpoint / SIGNATURE).read_bytes())
        digests, signature = record["files"], str(record["signature"]).encode()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or of any content
        return None
    return digests if hmac.compare_digest(signature_of(digests).encode(), signature) else None


def check_origin(checkpoint: str | Path, but: Iterable[str] = ()) -> None:
    """See that a run of this user's wrote every file of a checkpoint that is not weights, or that they trust it.

    Args:
        checkpoint: the folder.
        but: names of files at its top that nothing is loaded from.

    Raises:
        ValueError: not so; the message names the first file.
    """
    folder = Path(checkpoint)
    if (trusted := os.environ.get(TRUST)) and os.path.realpath(trusted) == os.path.realpath(folder):
        return
    remedy = f"if you trust all of this checkpoint: {TRUST}={folder}, else choose another OUTPUT"
    try:
        signed = read_signed(folder)
    except (OSError, Mistake) as error:
        raise Mistake(f"{folder}: no telling who wrote it: {error}; {remedy}") from error
    names = files_to_sign(folder, but)
    if signed is None:
        strange, why = names[:1] or [SIGNATURE], "is not signed with your key (SECURITY.md)"
    else:
        # What was added is not read at all; nor is a pipe, which would be waited for.
        strange = [name for name in names if name not in signed or not (folder / name).is_file()]
        strange = strange or [name for name, digest in digests_of(folder, names).items() if digest != signed[name]]
        why = "is not what was signed"
    if strange:
        raise Mistake(
            f"{folder / strange[0]}: may come from others: it {why}; resuming would run any code in it; {remedy}"
        )
