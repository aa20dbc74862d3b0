"""Run a slow batch, to be killed: python -m tests.slow_batch IN OUT CHUNK."""

from __future__ import annotations

import sys
from pathlib import Path

from guardreasoner_vl.batch.moderate import run_batch
from tests.scripted_guard import scripted_guard

if __name__ == "__main__":
    run_batch(scripted_guard(pause=0.005), Path(sys.argv[1]), Path(sys.argv[2]), chunk=int(sys.argv[3]))
