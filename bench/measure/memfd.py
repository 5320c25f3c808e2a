"""The hand-made rival: a process that holds the model in a memfd, and sends it to all who connect.

Run as a program it is that process: ``python -m measure.memfd MODEL SOCKET``.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

PIECE_BYTES = 16 << 20


class Holder:
    """The process, for as long as a ``with`` block lasts."""

    def __init__(self, model: Path) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vramd-bench-")
        self.path = f"{self._directory.name}/memfd.sock"
        command = [sys.executable, "-m", "measure.memfd", str(model), self.path]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise SystemExit("the hand-made holder did not start")

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._directory.cleanup()


def hold(model: Path, path: str) -> None:
    descriptor = os.memfd_create("by hand")
    with open(model, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        while piece := file.read(PIECE_BYTES):
            os.write(descriptor, piece)
    table = json.dumps(
        [[name, row["dtype"], row["shape"], row["data_offsets"][0]] for name, row in header.items()]
    ).encode()
    message = len(table).to_bytes(8, "little") + table
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        with connection:
            socket.send_fds(connection, [message], [descriptor])


if __name__ == "__main__":
    hold(Path(sys.argv[1]), sys.argv[2])
