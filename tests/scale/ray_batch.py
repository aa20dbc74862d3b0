"""Run a slow batch on a cluster, to be killed: python -m tests.scale.ray_batch ADDRESS IN OUT CHUNK."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.scale.ray_guard import RayGuard
from tests.scripted_guard import scripted_guard

if __name__ == "__main__":
    with RayGuard(sys.argv[1], partial(scripted_guard, pause=0.01), Policy(), 2) as guard:
        run_batch(guard, Path(sys.argv[2]), Path(sys.argv[3]), chunk=int(sys.argv[4]))
