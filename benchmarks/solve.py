r"""How fast the solvers are: against general MDP solvers, against themselves in NumPy, against the machine.

    python benchmarks/solve.py [--quick] [--json] [--only PART]

*tabular*: T, the stopping problem in tabular form: regime x depth x lattice of survivals, discount .99 per decision,
error at most 1e-6. Ours is `mdp.tabular.solve_tabular`; peers get the same transitions and rewards, built before the
clock starts (`peers.py`). NUMPY is the structured algorithm over depths without JAX, so that structure and compiler are
told apart. *machine*: one whole sweep over T against matrix products and a triad measured here. *full*: F, the full
problem, both bounds to 1e-6, by `mdp.many.solve_many`. *information*: B1 and B2, the best fixed length and the rule
that sees rejections at once, by `mdp.relaxations`. *start*: start-up of the command.

Turns alternate between ours and the peer; medians; compilation apart. A peer that is not installed is named as such.
`ratio` = peer_s / ours_s, or a fraction where the note says so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from grids import bench_full, bench_information
from measure import alternate, options, printer
from tabular import bench_machine, bench_tabular


def bench_start(emit: Callable, quick: bool) -> None:
    """`specstop solve` of a small problem, with an empty and with a filled compilation cache, against `import jax`."""
    problem = {
        "acceptance": {"kind": "iid", "accept_prob": 0.8},
        "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0},
        "max_candidates": 12,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.json"
        path.write_text(json.dumps(problem), encoding="utf-8")
        caches = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "jax"), "SPECSTOP_CACHE": str(Path(folder) / "own")}
        environment = {**os.environ, **caches, "PYTHONPATH": os.pathsep.join(sys.path)}

        def command():
            subprocess.run(
                [sys.executable, "-m", "specstop", "solve", str(path), "--json"],
                check=True, capture_output=True, env=environment,
            )  # fmt: skip

        def bare():
            subprocess.run([sys.executable, "-c", "import jax"], check=True)

        begun = time.perf_counter()
        command()
        cold = time.perf_counter() - begun
        warm, jax_alone, *_ = alternate(command, bare, 2 if quick else 5)
    emit("specstop solve, empty cache", cold, "import jax", jax_alone, 1, "a process each")
    emit("specstop solve, filled cache", warm, "import jax", jax_alone, 2 if quick else 5, "a process each")


PARTS = {
    "tabular": bench_tabular,
    "machine": bench_machine,
    "full": bench_full,
    "information": bench_information,
    "start": bench_start,
}

if __name__ == "__main__":
    chosen = options(__doc__ or "", list(PARTS))
    for name, part in PARTS.items():
        if chosen.only in (None, name):
            part(printer(chosen.json), chosen.quick)
