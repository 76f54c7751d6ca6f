r"""How fast the solvers are: against general MDP solvers, against themselves in NumPy, against the machine.

    python benchmarks/solve.py [--quick] [--json]

*T*, the stopping problem in tabular form: regime x depth x lattice of survivals, discount .99 per decision, error at
most 1e-6. Ours is `mdp.tabular.solve_tabular`; peers get the same transitions and rewards as sparse arrays, built
before the clock starts. NUMPY is the same structured algorithm without JAX, so that structure and compiler are told
apart. *F*, the full problem: renewal, K = 64, Z = 8, both bounds to 1e-6, by `mdp.many.solve_many`. Then one sweep's
traffic against a triad measured here, and start-up of the command.

Turns alternate between ours and the peer; medians; compilation apart. A peer that is not installed is named as such.
`ratio` = peer_s / ours_s, or a fraction where the note says so.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mdp.many import solve_many
from mdp.problem import FiniteProblem
from mdp.solve import solve
from mdp.tabular import TabularProblem, solve_tabular

SIZES = {1_000: (7, 4, 32), 10_000: (15, 8, 80), 100_000: (31, 8, 400), 1_000_000: (63, 8, 2000)}
RATE, DISCOUNT, TOLERANCE = 0.3, 0.99, 1e-6
LOWEST = 4.0
"""Survivals of T go down to exp(-4): below, nobody drafts."""


TURN = 0.02
"""Seconds: a turn repeats short calls until it is about this long. A single call right after a peer's turn finds cold
caches and sleeping threads; it takes us 2 to 3 times longer than the next ones."""


def alternate(ours: Callable, peer: Callable | None, runs: int) -> tuple[float, float | None, Any, Any]:
    """Median seconds a call of both, in turns after a warm-up each, and what they returned last."""
    sides: list[tuple[Callable, int, list[float]]] = []
    for work in (ours, peer):
        if work is not None:
            work()
            begun = time.perf_counter()
            work()
            sides.append((work, max(1, int(TURN / (time.perf_counter() - begun))), []))
    out = [None, None]
    for _ in range(runs):
        for side, (work, repeats, times) in enumerate(sides):
            begun = time.perf_counter()
            for _ in range(repeats):
                out[side] = work()
            times.append((time.perf_counter() - begun) / repeats)
    return median(sides[0][2]), median(sides[1][2]) if peer else None, *out


def tabular(depth: int, size: int, knots: int) -> TabularProblem:
    """T: sticky regimes, acceptances from .95 down to .4, rounded to the lattice."""
    rng = np.random.default_rng(0)
    chain = 0.5 * np.eye(size) + 0.5 * rng.dirichlet(np.ones(size), size=size)
    spacing = LOWEST / (knots - 1)
    steps = np.maximum(1, np.rint(-np.log(np.linspace(0.95, 0.4, size)) / spacing)).astype(int)
    return TabularProblem(chain, rng.dirichlet(np.ones(size)), steps, np.exp(-spacing * np.arange(knots)), 1.0, 5.0)


def in_numpy(problem: TabularProblem, depth: int) -> np.ndarray:
    """The structured algorithm of `mdp.tabular` in NumPy, without its early ends: the values."""
    size, knots = len(problem.initial), len(problem.survival)
    onward = np.minimum(np.arange(knots) + problem.steps[:, None], knots - 1)
    rows = np.arange(size)[:, None]
    gain, base = problem.transition @ problem.survival[onward], 1 - RATE * (problem.verify_cost - problem.draft_cost)
    price = base
    for _ in range(50):
        worth, slope = np.zeros((depth + 1, size, knots)), np.zeros((size, knots))
        for k in range(depth - 1, -1, -1):
            going_on = gain - price + DISCOUNT * problem.transition @ worth[k + 1][rows, onward]
            slope = np.where(going_on > 0, DISCOUNT * problem.transition @ slope[rows, onward] - 1, 0.0)
            worth[k] = np.maximum(going_on, 0.0)
        gap = base + DISCOUNT * problem.initial @ worth[0, :, 0] - price
        move = gap / (DISCOUNT * problem.initial @ slope[:, 0] - 1)
        if abs(move) <= 1e-14 * (1 + price):
            break
        price -= move
    return worth + (price - RATE * problem.draft_cost) / (1 - DISCOUNT)


def state_action_pairs(problem: TabularProblem, depth: int) -> tuple[Any, ...]:
    """T as general solvers take it: reward [L], sparse law [L, S], state and action of each of the L pairs."""
    from scipy.sparse import csr_matrix

    size, knots = len(problem.initial), len(problem.survival)
    states = (depth + 1) * size * knots
    k, z, j = (part.ravel() for part in np.indices((depth + 1, size, knots)))
    onward = np.minimum(j[:, None] + problem.steps, knots - 1)
    goes = k < depth
    to = ((k[:, None] + 1) * size + np.arange(size)) * knots + onward
    again = np.broadcast_to(np.arange(size) * knots, (states, size))
    earned = (problem.transition[z] * problem.survival[onward]).sum(axis=1) - RATE * problem.draft_cost
    # Rows in order of state, then action: STOP (0), CONTINUE (1). At k = K there is STOP alone.
    state, action = np.concatenate([np.arange(states), np.flatnonzero(goes)]), np.repeat([0, 1], [states, goes.sum()])
    order = np.lexsort((action, state))
    columns = np.concatenate([again, to[goes]])[order]
    chances = np.concatenate([np.broadcast_to(problem.initial, (states, size)), problem.transition[z[goes]]])[order]
    reward = np.concatenate([np.full(states, 1 - RATE * problem.verify_cost), earned[goes]])[order]
    law = csr_matrix((chances.ravel(), columns.ravel(), np.arange(len(order) + 1) * size), shape=(len(order), states))
    return reward, law, state[order], action[order]


def optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def bench_tabular(emit: Callable, quick: bool) -> None:
    quantecon = optional("quantecon")
    for states, shape in list(SIZES.items())[: 3 if quick else 4]:
        problem, depth, runs = tabular(*shape), shape[0], 11 if states < 1e5 else 7 if states < 1e6 else 3
        begun = time.perf_counter()
        solve_tabular(problem, depth, rate=RATE, discount=DISCOUNT)
        first = time.perf_counter() - begun

        def ours(problem=problem, depth=depth, **more):
            return solve_tabular(problem, depth, rate=RATE, discount=DISCOUNT, **more)

        exact = in_numpy(problem, depth)
        fast, slow, found, _ = alternate(ours, lambda p=problem, d=depth: in_numpy(p, d), runs)
        error = np.abs(found.value - exact).max()
        note = f"our error {error:.0e} against NumPy at rounding, {found.num_sweeps} sweeps, first call {first:.2f} s"
        emit(f"T {states:.0e} full value", fast, "same algorithm in NumPy", slow, runs, note)
        renewal, _, average, _ = alternate(lambda p=problem, d=depth: solve_tabular(p, d), None, runs)
        note = f"rate {average.rate:.9f}, residual {average.residual:.0e}, {average.num_sweeps} sweeps"
        emit(f"T {states:.0e} throughput form", renewal, None, None, runs, note)
        if quantecon is None:
            emit(f"T {states:.0e} full value", fast, "QuantEcon DiscreteDP", None, 0, "quantecon is not installed")
            continue
        reward, law, state, action = state_action_pairs(problem, depth)
        peer = quantecon.markov.DiscreteDP(reward, law, DISCOUNT, state, action)
        for method in ("modified_policy_iteration", "policy_iteration", "value_iteration"):
            if (
                states > (1e4 if method == "policy_iteration" or quick else 1e5)
                and method != "modified_policy_iteration"
            ):
                emit(f"T {states:.0e} full value", fast, f"QuantEcon {method}", None, 0, "left out: takes too long")
                continue

            def theirs(peer=peer, method=method):
                return peer.solve(method=method, epsilon=TOLERANCE, max_iter=100_000)

            count = 1 if method == "value_iteration" else runs
            fast, slow, found, result = alternate(ours, theirs, count)
            their_error = np.abs(result.v - exact.ravel()).max()
            note = f"errors: ours {np.abs(found.value - exact).max():.0e}, theirs {their_error:.0e}"
            emit(f"T {states:.0e} full value", fast, f"QuantEcon {method}", slow, count, note)
            if method == "modified_policy_iteration":
                lean, slow, found, _ = alternate(lambda ours=ours: ours(full=False), theirs, count)
                note = f"all thresholds [K, Z], no table of values; residual {found.residual:.0e}"
                emit(f"T {states:.0e} thresholds only", lean, f"QuantEcon {method}", slow, count, note)


def full_problems(count: int) -> list[FiniteProblem]:
    """F: sticky regimes, acceptances .3 to .98, draft steps from .02 to .5 of a target call, V affine."""
    rng, size, depth = np.random.default_rng(0), 8, 64
    found = []
    for _ in range(count):
        stick = rng.uniform(0, 0.9)
        chain = stick * np.eye(size) + (1 - stick) * rng.dirichlet(np.ones(size), size=size)
        accept = np.tile(rng.uniform(0.3, 0.98, size), (depth, 1))
        draft_time = float(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
        verify_time = 1.0 + rng.uniform(0, 0.02) * np.arange(depth + 1)
        found.append(FiniteProblem(chain, accept, rng.dirichlet(np.ones(size)), draft_time, verify_time))
    return found


def bench_full(emit: Callable, quick: bool) -> None:
    count = 200 if quick else 10_000
    grid = full_problems(count)
    first = solve_many(grid[:64]).seconds
    cpu = time.process_time()
    batch = solve_many(grid)
    cpu = (time.process_time() - cpu) / count
    lower, upper = batch.bounds.T
    unclosed = sum(status.name != "successful" for status in batch.status)
    alone = grid[:: max(1, count // 5)][:5]
    for problem in alone:
        solve(problem)
    begun = time.perf_counter()
    for problem in alone:
        solve(problem)
    slow = (time.perf_counter() - begun) / len(alone)
    note = (
        f"per problem; {count} problems, {1e3 * cpu:.2f} ms of processor time each, {unclosed} not closed, "
        f"{batch.num_refined[0]} refined, {batch.num_refined[1]} one at a time, "
        f"widest {((upper - lower) / lower).max():.1e}, first call {first:.1f} s"
    )
    emit("F solve_many", batch.seconds / count, "mdp.solve, one at a time", slow, 1, note)


def bench_bandwidth(emit: Callable, quick: bool) -> None:
    """Bytes of the table of values, written once, over a triad's bandwidth in the same run."""
    size = 2**22 if quick else 2**24
    a, b, c = np.zeros(size), np.ones(size), np.ones(size)

    def triad():
        np.multiply(c, 3.0, out=a)
        np.add(a, b, out=a)

    states, shape = list(SIZES.items())[2 if quick else 3]
    problem = tabular(*shape)

    def sweeps():
        return solve_tabular(problem, shape[0], rate=RATE, discount=DISCOUNT)

    ours, machine, found, _ = alternate(sweeps, triad, 5)
    bandwidth = 5 * 8 * size / machine  # two passes: read 1 and write 1, read 2 and write 1
    achieved = found.value.nbytes * int(found.num_sweeps) / ours
    note = f"fraction of {bandwidth / 1e9:.1f} GB/s; a sweep counted as its table of values written once"
    emit(f"T {states:.0e} traffic", ours / int(found.num_sweeps), "triad", None, 5, note, ratio=achieved / bandwidth)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: smaller sizes, fewer peers")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--only", choices=["tabular", "full", "bandwidth", "start"], help="one part")
    options = parser.parse_args()

    def emit(name, ours_s, peer, peer_s, runs, note, ratio=None):
        ratio = peer_s / ours_s if ratio is None and peer_s is not None else ratio
        row = {
            "name": name,
            "ours_s": ours_s,
            "peer": peer,
            "peer_s": peer_s,
            "ratio": ratio,
            "runs": runs,
            "note": note,
        }
        if options.json:
            print(json.dumps(row), flush=True)
        else:
            theirs = "-" if peer_s is None else f"{peer_s:.3g} s"
            shown = "-" if ratio is None else f"{ratio:.3g}"
            print(f"{name}: {ours_s:.3g} s | {peer or '-'} {theirs} | {shown} | {note}", flush=True)

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{os.cpu_count()} cores, load {load:.1f} at the start", file=sys.stderr)
    parts = {"tabular": bench_tabular, "full": bench_full, "bandwidth": bench_bandwidth, "start": bench_start}
    for name, part in parts.items():
        if options.only in (None, name):
            part(emit, options.quick)


if __name__ == "__main__":
    main()
