"""`python -m decode_svc --config FILE`: one decode worker.

A worker of several ranks starts the others itself. Where a launcher has started them all (torchrun: RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), rank 0 is the worker, and the others do what it says.
"""

from __future__ import annotations

import os
import sys

from decode_svc.pool import DecodePool
from worker.serving import main_of


def main() -> int:
    return main_of("a Legato decode worker", "decode", DecodePool, os.environ)


if __name__ == "__main__":
    sys.exit(main())
