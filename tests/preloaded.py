"""A Python that has imported everything: what is started with it is forked from a server, and runs at once.

Given to a run script as PYTHON, it spares every process of a launch its 15 s of imports. Script or module, arguments,
environment, folder, signals and processes are the launch's own; a client that is killed takes its process along.
`python preloaded.py SOCKET CLIENT` serves, and writes CLIENT, the interpreter to use.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

MODULES = (
    *("open_r1.grpo", "open_r1.sft", "open_r1.reporting.page", "accelerate.commands.launch", "torch.distributed.run"),
    *("deepspeed", "torch.utils.cpp_extension", "bitsandbytes", "tensorboard", "math_verify"),
    *("matplotlib.backends.backend_svg", "transformers.models.qwen2_vl.modeling_qwen2_vl"),
)

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
start = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
socket.send_fds(server, [len(start).to_bytes(8, "big")], [0, 1, 2])
server.sendall(start)
answers = server.makefile()
process = int(answers.readline())
stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
for number in stops:
    signal.signal(number, lambda number, _: os.kill(process, number))
code = int(answers.readline())
for number in stops:
    signal.signal(number, signal.SIG_DFL)
sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)
"""


def serve(address: str, client: Path) -> None:
    """Fork for every client."""
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # what is here stays shared with every process: no collection, at its end neither, walks through it
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            attend(connection)
        connection.close()


def attend(connection: socket.socket) -> None:
    """Start what the client asks for, tell it the process and then how that ended."""
    length, descriptors, *_ = socket.recv_fds(connection, 8, 3)
    stream = connection.makefile("rb")
    argv, environment, folder = json.loads(stream.read(int.from_bytes(length, "big")))
    process = os.fork()
    if process == 0:
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
        connection.close()
        leave(lambda: start(argv, environment, folder))
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{process}\n".encode())
    threading.Thread(target=follow, args=(connection, process), daemon=True).start()
    _, status = os.waitpid(process, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def follow(connection: socket.socket, process: int) -> None:
    """End the process as soon as its client, which says nothing more, is gone."""
    with contextlib.suppress(ConnectionError, ProcessLookupError):
        connection.recv(1)
        os.kill(process, signal.SIGKILL)


def start(argv: list[str], environment: dict[str, str], folder: str) -> None:
    """Be `python SCRIPT ARGUMENTS` or `python -m MODULE ARGUMENTS`, as far as these can tell."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which who is started in the background ignores
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and under nohup
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.executable = argv[0]
    for number, name in ((1, "stdout"), (2, "stderr")):  # opened anew: what the server had there may be of another kind
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    if argv[1] == "-c":
        return exec(argv[2], {"__name__": "__main__"})
    sys.argv = argv[2:] if argv[1] in ("-u", "-m") else argv[1:]
    script = os.path.abspath(sys.argv[0])
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [folder if argv[1] == "-m" else os.path.dirname(script), *paths, *sys.path[1:]]
    if argv[1] == "-m":
        sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(script, run_name="__main__")


def leave(run: Callable[[], None]) -> NoReturn:
    """Run this, and end as Python does afterwards, but free nothing: all that was imported is a second's work."""
    code = 0
    try:
        run()
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
