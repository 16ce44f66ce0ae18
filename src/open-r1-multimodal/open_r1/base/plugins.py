"""Imports what a user names as `module:name`: a reward, an advantage, a trainer or a benchmark of one's own."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from open_r1.base.errors import Mistake, UserCodeError, first_line


def import_here(name: str) -> ModuleType:
    """A module, also one in the current folder with what it imports there.

    The folder is on `sys.path` during this import alone, and last: else libraries could import the user's files in
    place of their own.
    """
    here = os.getcwd()
    if here in sys.path:  # in PYTHONPATH
        return importlib.import_module(name)
    sys.path.append(here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)


def import_named(
    option: str, kind: str, name: str, known: Iterable[str] = (), fits: Callable[[Any], bool] = callable
) -> Any:
    """What stands behind `module:name`: a function, a class, or something else that fits.

    Args:
        option: the setting or argument that names it, for the message.
        kind: what it is in one word, for the message: `reward`.
        name: `module:name`.
        known: names that stand for themselves, for the message.
        fits: whether a value is of the kind.

    Raises:
        Mistake: there is no such module or nothing that fits of this name in it, or importing it raises.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        listed = f"known: {', '.join(known)}; " if known else ""
        raise Mistake(f"{option}: unknown {kind} {name!r} ({listed}your own: module:name)")
    if module_name.endswith(".py") or "/" in module_name:
        raise Mistake(
            f"{option}: {kind} {name!r}: write {Path(module_name).stem}:{attribute}, as Python imports it; the file is "
            "looked for in this folder and on PYTHONPATH"
        )
    try:
        module = import_here(module_name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise Mistake(
                f"{option}: no module {module_name!r} for {kind} {name!r} on PYTHONPATH or in this folder"
            ) from error
        raise Mistake(f"{option}: module {module_name!r} cannot be imported: {describe_error(error)}") from error
    value = getattr(module, attribute, None)
    if not fits(value):
        where = getattr(module, "__file__", None) or "built in"
        what = "function" if fits is callable else kind
        raise Mistake(f"{option}: module {module_name!r} ({where}) has no {what} {attribute!r}")
    return value


@contextmanager
def blamed_on(option: str, name: str) -> Iterator[None]:
    """What a function of the user's raises in the block becomes an error that names it and its option."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise UserCodeError(f"{option}: {name} raised {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """An exception with the line of the user's that it comes from."""
    places = [f" ({frame.filename}, line {frame.lineno})" for frame in traceback.extract_tb(error.__traceback__)]
    passed_through = (str(Path(__file__).parents[1]), importlib.__file__, "<frozen", "site-packages")
    theirs = [place for place in places if not any(part in place for part in passed_through)]
    return f"{type(error).__name__}: {first_line(error)}{theirs[-1] if theirs else ''}"
