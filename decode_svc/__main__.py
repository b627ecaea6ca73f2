"""`python -m decode_svc --config FILE`: one decode worker."""

from __future__ import annotations

import os
import sys

from decode_svc.pool import DecodePool
from service.config import WorkerConfig
from service.run import arguments, run_service
from worker.serving import serve


def main() -> int:
    config, exit_with_stdin = arguments("a Legato decode worker", WorkerConfig, {**os.environ, "LEGATO_ROLE": "decode"})
    return run_service(lambda stop: serve(config, stop, DecodePool), exit_with_stdin=exit_with_stdin)


if __name__ == "__main__":
    sys.exit(main())
