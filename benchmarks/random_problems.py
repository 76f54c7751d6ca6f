r"""Random problems of every finite process, coupling and cost, solved one by one: how many bounds do not close?

    python benchmarks/random_problems.py [--count 1000] [--seed 0] [--quick] [--json]

Z <= 16 regimes, K <= 64 candidates; a problem counts as closed if `mdp.solve.solve` says `successful`, that is, the
bounds on the throughput are within 1e-6 of each other and every threshold is known to 1e-6 tokens. `--json` prints the
line of `benchmarks/README.md`, with no peer: {name, ours_s, peer, peer_s, ratio, runs, note}.
"""

import argparse
import json
import sys
import time
from collections import Counter
from typing import Any

import jax
import numpy as np

from mdp.acceptance import IID, MarkovModulated, Position, TokenPair
from mdp.cost import Affine, Overlapped, Roofline, Table
from mdp.problem import Persistent, StoppingProblem
from mdp.solve import SolveStatus, solve

MOST_REGIMES, MOST_CANDIDATES = 16, 64
FORGET = 100  # problems, after which compiled programs are dropped: some hundred shapes exhaust a process's memory maps
PROCESSES = ("iid", "position", "markov_modulated", "persistent", "token_pair")
COSTS = ("affine", "table", "roofline", "overlapped")


def draw(seed: int) -> StoppingProblem:
    """The problem of this seed; law, process, cost and size all at random."""
    rng = np.random.default_rng(seed)
    kind = PROCESSES[rng.choice(len(PROCESSES), p=(0.05, 0.05, 0.35, 0.35, 0.2))]
    depth = int(rng.integers(1, MOST_CANDIDATES + 1))
    while True:
        try:
            return _drawn(rng, kind, depth)
        except ValueError as refused:  # does not communicate, or persistent with round times that fall
            print(f"seed {seed}: drawn again ({refused})", file=sys.stderr)


def _drawn(rng: np.random.Generator, kind: str, depth: int) -> StoppingProblem:
    size = int(rng.integers(1, MOST_REGIMES + 1))
    cost = _cost(rng, depth, dips=kind not in ("persistent", "token_pair"))
    if kind == "iid":
        return StoppingProblem(IID(rng.uniform(0.05, 0.99)), cost, depth)
    if kind == "position":
        return StoppingProblem(Position(rng.uniform(0.05, 0.99, depth)), cost, depth)
    if kind == "token_pair":
        target = _law(rng, int(rng.integers(2, 5)))
        weight = rng.uniform(0.1, 0.9)
        draft = weight * target + (1 - weight) * _law(rng, len(target))
        return StoppingProblem(TokenPair(draft, target), cost, depth)
    stick = rng.uniform(0.0, 0.95)
    transition = stick * np.eye(size) + (1 - stick) * _law(rng, size)
    chain = MarkovModulated(transition, rng.uniform(0.05, 0.99, size), rng.dirichlet(np.ones(size)))
    coupling = Persistent(_law(rng, size), _law(rng, size)) if kind == "persistent" else None
    return StoppingProblem(chain, cost, depth, coupling)


def _law(rng: np.random.Generator, size: int) -> np.ndarray:
    """Row-stochastic, from nearly deterministic rows to even ones."""
    return rng.dirichlet(np.full(size, np.exp(rng.uniform(np.log(0.1), np.log(3.0)))), size=size)


def _cost(rng: np.random.Generator, depth: int, dips: bool) -> Any:
    """Draft steps from .01 to one target pass; tables with steps, and with dips where rounds renew."""
    kind = COSTS[rng.choice(len(COSTS))]
    draft_time = float(np.exp(rng.uniform(np.log(0.01), 0.0)))
    slope = float(rng.choice([0.0, 0.02, 0.1]))
    if kind == "affine":
        return Affine(draft_time, 1.0, slope)
    if kind == "overlapped":
        return Overlapped(draft_time, 1.0, slope, overlap=float(rng.choice([0.5, 1.0, rng.uniform()])))
    if kind == "roofline":
        batch = int(rng.choice([1, 8, 64]))
        return Roofline(2e9 * draft_time * 7, 0.0, 2e9 * draft_time * 7, 14e9, 0.0, 14e9, 2e12, 2e14, batch)
    steps = rng.choice([0.0, 0.25, 1.0], depth, p=(0.8, 0.15, 0.05))
    times = 1.0 + np.append(0.0, np.cumsum(steps))
    if dips:
        times = times * rng.uniform(0.9, 1.1, depth + 1)
    return Table(draft_time, times.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="problems (1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first problem's seed (0); the next ones follow")
    parser.add_argument("--quick", action="store_true", help="20 problems, under a minute")
    parser.add_argument("--json", action="store_true", help="one object on a line")
    options = parser.parse_args()
    count = 20 if options.quick else options.count
    tallies: dict[str, Counter] = {status.name: Counter() for status in SolveStatus}
    seconds, width, begun = [], 0.0, time.perf_counter()
    for seed in range(options.seed, options.seed + count):
        if (seed - options.seed) % FORGET == FORGET - 1:
            jax.clear_caches()
        problem = draw(seed)
        solution = solve(problem)
        seconds.append(solution.seconds)
        lower, upper = solution.bounds
        process = problem.acceptance.kind + (" persistent" if problem.coupling is not None else "")
        tallies[solution.status.name][process] += 1
        if solution.status is SolveStatus.successful:
            width = max(width, (upper - lower) / lower)
        else:
            shape = f"K {problem.max_candidates} Z {problem.acceptance.num_regimes}"
            print(f"seed {seed}: {process} {problem.cost.kind} {shape}: {solution.status.name}, "
                  f"width {(upper - lower) / lower:.1e}, {solution.seconds:.1f} s", file=sys.stderr)  # fmt: skip
    total = time.perf_counter() - begun
    shown = "; ".join(
        f"{name} {tally.total()} ({', '.join(f'{process} {number}' for process, number in sorted(tally.items()))})"
        for name, tally in tallies.items()
        if tally
    )
    note = (
        f"mean seconds a problem, compilation included; {shown}; widest of the closed {width:.1e}; median "
        f"{np.median(seconds):.3f} s, slowest {max(seconds):.1f} s (seed {options.seed + int(np.argmax(seconds))})"
    )
    name = f"{count} random problems from seed {options.seed}"
    row = {"name": name, "ours_s": total / count, "peer": None, "peer_s": None, "ratio": None, "runs": 1, "note": note}
    print(json.dumps(row) if options.json else f"{name}: {total:.0f} s in all, {note}")


if __name__ == "__main__":
    main()
