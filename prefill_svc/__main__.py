"""`python -m prefill_svc --config FILE`: one prefill worker."""

from __future__ import annotations

import os
import sys

from prefill_svc.pool import PrefillPool
from service.config import WorkerConfig
from service.run import arguments, run_service
from worker.serving import serve


def main() -> int:
    config, exit_with_stdin = arguments(
        "a Legato prefill worker", WorkerConfig, {**os.environ, "LEGATO_ROLE": "prefill"}
    )
    return run_service(lambda stop: serve(config, stop, PrefillPool), exit_with_stdin=exit_with_stdin)


if __name__ == "__main__":
    sys.exit(main())
