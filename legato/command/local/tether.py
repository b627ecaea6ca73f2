"""Runs a command and ends it when standard input closes: it cannot outlive the process that holds the other end.

    python -m legato.command.local.tether COMMAND ARGUMENT...

For programs that are not ours (the embedded Redis server); our services have --exit-with-stdin.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 2.0


def main(command: list[str]) -> int:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    threading.Thread(target=_watch, args=(process,), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _watch(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
