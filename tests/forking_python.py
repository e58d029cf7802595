"""A Python for scripts that start many: `PYTHON -m MODULE ARGUMENTS` in a fork of a process that has torch imported.

Importing torch, transformers and trl takes 8 of the 14 seconds that a stage of two steps takes, and a script of twelve
stages pays it twelve times. A fork starts with all that in place and is a process of its own otherwise: its own folder,
environment, arguments, streams and exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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
def forking_python(folder: Path) -> Iterator[Path]:
    """The path of such an interpreter in a new folder, of use until the end."""
    folder.mkdir()
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, "-m", "tests.forking_python", address])
    try:
        while not Path(address).exists():
            assert server.poll() is None, "the process to fork from has ended"
            time.sleep(0.1)
        yield client
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> None:
    """Fork for each connection, one after the other, and send back the exit code."""
    for module in IMPORTED:
        importlib.import_module(module)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            with connection:
                asked, streams, _, _ = socket.recv_fds(connection, LARGEST, 3)
                while more := connection.recv(LARGEST):
                    asked += more
                if not (child := os.fork()):
                    listening.close()
                    connection.close()
                    arguments, folder, environment = json.loads(asked)
                    _become(arguments, folder, environment, streams)
                for stream in streams:
                    os.close(stream)
                connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())


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
    serve(sys.argv[1])
