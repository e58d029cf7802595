"""A Python for scripts that start many: `PYTHON -m MODULE ARGUMENTS` in a fork of a process that has torch imported.

Importing torch, transformers and trl takes 8 of the 14 seconds that a stage of two steps takes, and a script of twelve
stages pays it twelve times. A fork starts with all that in place and is a process of its own otherwise: its own folder,
environment, arguments, streams and exit code. Several run at once, and one whose interpreter is killed is killed too.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

IMPORTED = (
    "datasets", "matplotlib.pyplot", "peft", "tensorboard.summary.writer.event_file_writer", "torch",
    "transformers.models.qwen2_vl.modeling_qwen2_vl", "transformers.trainer", "trl.trainer.grpo_trainer",
)  # fmt: skip
LARGEST = 2**17  # bytes of a request: the environment is the most of it
# What stands in for the interpreter: sends its arguments and streams, and ends as the fork does.
CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [asked], [0, 1, 2])
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(16) or b"1"))
"""


@contextmanager
def forking_python(folder: Path, *more: str, **environment: str) -> Iterator[Path]:
    """The path of such an interpreter in a new folder, of use until the end; `more` modules are imported too."""
    folder.mkdir()
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    command = [sys.executable, "-m", "tests.forking_python", address, *more]
    server = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        while not Path(address).exists():
            assert server.poll() is None, "the process to fork from has ended"
            time.sleep(0.1)
        yield client
    finally:
        server.terminate()
        server.wait()


def serve(address: str, *more: str) -> None:
    """Fork for each connection, and send back the exit code."""
    for module in (*IMPORTED, *more):
        importlib.import_module(module)
    running: dict[int, socket.socket] = {}  # a fork's process id -> its connection
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        while True:
            if select.select([listening], [], [], 0.02)[0]:
                connection, _ = listening.accept()
                asked, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
                while more_asked := connection.recv(LARGEST):
                    asked += more_asked
                if not (child := os.fork()):
                    for other in (listening, connection, *running.values()):
                        other.close()
                    arguments, folder, environment = json.loads(asked)
                    _become(arguments, folder, environment, streams)
                for stream in streams:
                    os.close(stream)
                running[child] = connection
            _look_after(running)


def _look_after(running: dict[int, socket.socket]) -> None:
    """Tell the interpreters of ended forks, and end the forks of killed interpreters."""
    for child, connection in list(running.items()):
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            poll = select.poll()
            poll.register(connection, 0)  # a peer that is gone is always told
            if poll.poll(0):
                os.kill(child, signal.SIGKILL)
            continue
        with connection, suppress(BrokenPipeError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        del running[child]


def _become(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Run `-m MODULE ARGUMENTS` or `-c CODE` as the interpreter would, and end."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.argv = arguments[1:]
    code = 1
    if arguments[0] == "-u":
        del arguments[0], sys.argv[0]
    try:
        if arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        else:
            assert arguments[0] == "-m"
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
