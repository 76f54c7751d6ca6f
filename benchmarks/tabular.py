"""T: the tabular form against general solvers, against itself in NumPy, against the machine."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import alternate
from peers import peers

from mdp.tabular import TabularProblem, backward, solve_tabular

__all__ = ["bench_machine", "bench_tabular"]

SIZES = {1_000: (7, 4, 32), 10_000: (15, 8, 80), 100_000: (31, 8, 400), 1_000_000: (63, 8, 2000)}
RATE, DISCOUNT, TOLERANCE = 0.3, 0.99, 1e-6
LOWEST = 4.0
"""Survivals of T go down to exp(-4): below, nobody drafts."""


def tabular(depth: int, size: int, knots: int) -> TabularProblem:
    """T: sticky regimes, acceptances from .95 down to .4, rounded to the lattice."""
    rng = np.random.default_rng(0)
    chain = 0.5 * np.eye(size) + 0.5 * rng.dirichlet(np.ones(size), size=size)
    spacing = LOWEST / (knots - 1)
    steps = np.maximum(1, np.rint(-np.log(np.linspace(0.95, 0.4, size)) / spacing)).astype(int)
    return TabularProblem(chain, rng.dirichlet(np.ones(size)), steps, np.exp(-spacing * np.arange(knots)), 1.0, 5.0)


def in_numpy(problem: TabularProblem, depth: int) -> np.ndarray:
    """Backward induction over depths and Newton's method in NumPy, without passes or early ends: the values."""
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


def bench_tabular(emit: Callable, quick: bool) -> None:
    for states, shape in list(SIZES.items())[: 3 if quick else 4]:
        problem, depth, runs = tabular(*shape), shape[0], 11 if states < 1e5 else 7 if states < 1e6 else 3
        ours = partial(solve_tabular, problem, depth, rate=RATE, discount=DISCOUNT)
        begun = time.perf_counter()
        ours()
        first = time.perf_counter() - begun
        exact = in_numpy(problem, depth)
        fast, slow, found, _ = alternate(ours, lambda p=problem, d=depth: in_numpy(p, d), runs)
        error = np.abs(found.value - exact).max()
        note = f"our error {error:.0e} against NumPy at rounding, {found.num_sweeps} sweeps, first call {first:.2f} s"
        emit(f"T {states:.0e} full value", fast, "same structure in NumPy", slow, runs, note)
        renewal, _, average, _ = alternate(partial(solve_tabular, problem, depth), None, runs)
        note = f"rate {average.rate:.9f}, residual {average.residual:.0e}, {average.num_sweeps} sweeps"
        emit(f"T {states:.0e} throughput form", renewal, None, None, runs, note)
        for peer in peers(problem, depth, RATE, DISCOUNT, TOLERANCE, quick):
            name, count = f"T {states:.0e} full value", 1 if peer.slow else runs
            if peer.solve is None:
                emit(name, fast, peer.name, None, 0, peer.why)
                continue
            fast, slow, found, result = alternate(ours, peer.solve, count, peer.prepare)
            off = peer.values(result) - exact.ravel()
            note = f"errors: ours {np.abs(found.value - exact).max():.0e}, theirs {np.abs(off).max():.0e}"
            if np.abs(off).max() > 1e-3:
                note += f", {np.abs(off - off.mean()).max():.0e} apart from a constant"
            emit(name, fast, peer.name, slow, count, note)
            if peer.name == "QuantEcon modified_policy_iteration":
                fast, slow, found, _ = alternate(partial(ours, full=False), peer.solve, count)
                how = "one pass over survivals" if found.one_pass else "by depth"
                note = f"no table of values; {how}; residual {found.residual:.0e}, {found.num_sweeps} sweeps"
                emit(f"T {states:.0e} thresholds only", fast, peer.name, slow, count, note)


def bench_machine(emit: Callable, quick: bool) -> None:
    """One whole sweep over T: every layer and survival, none left out, against products of the same matrices alone."""
    states, shape = list(SIZES.items())[2 if quick else 3]
    depth, size, knots = shape
    problem = tabular(*shape)
    price = solve_tabular(problem, depth, rate=RATE, discount=DISCOUNT).stop_value * (1 - DISCOUNT) + RATE
    onward = np.minimum(np.arange(knots) + problem.steps[:, None], knots - 1)
    flops, table = 2 * size * size * knots * depth, 8 * (depth + 1) * size * knots
    with jax.enable_x64(True):
        law, gain = (
            jnp.asarray(DISCOUNT * problem.transition),
            jnp.asarray(problem.transition @ problem.survival[onward]),
        )
        steps, price = jnp.asarray(problem.steps, jnp.int32), jnp.asarray(price)
        rows = jnp.tile(gain, (1, depth))
        sweep = partial(backward, depth=depth, width=knots, edge=False, ends=False)
        keeps = jax.jit(lambda *arrays: sweep(*arrays, values=True)[2])
        forgets = jax.jit(lambda *arrays: sweep(*arrays)[0])
        chain = jax.jit(lambda law, x: jax.lax.fori_loop(0, depth, lambda _, now: law @ now, x))
        one = jax.jit(lambda law, x: law @ x)

        def done(work: Any, *arrays: Any) -> Callable:
            def call():
                with jax.enable_x64(True):
                    return work(*arrays).block_until_ready()

            return call

        given = (law, gain, steps, price)
        note = f"fraction of XLA's rate, {depth} products [{size}, {size}] [{size}, {knots}] in a row, nothing kept"
        fast, slow, *_ = alternate(done(forgets, *given), done(chain, law, gain), 15)
        note += f": {flops / slow / 1e9:.1f} against {flops / fast / 1e9:.1f} Gflop/s of the sweep"
        emit(f"T {states:.0e} sweep, values not kept", fast, "XLA matmul", slow, 15, note, ratio=slow / fast)
        fast, slow, *_ = alternate(done(keeps, *given), done(one, law, rows), 15)
        note = f"fraction of XLA's rate, one product [{size}, {size}] [{size}, {depth * knots}] that writes its result"
        note += f": {flops / slow / 1e9:.1f} against {flops / fast / 1e9:.1f} Gflop/s"
        emit(f"T {states:.0e} sweep, values written", fast, "XLA matmul", slow, 15, note, ratio=slow / fast)
    cells = 2**22 if quick else 2**24
    a, b, c = np.zeros(cells), np.ones(cells), np.ones(cells)

    def triad():
        np.multiply(c, 3.0, out=a)
        np.add(a, b, out=a)

    fast, machine, *_ = alternate(done(keeps, *given), triad, 5)
    bandwidth = 5 * 8 * cells / machine  # two passes: read 1 and write 1, read 2 and write 1
    note = f"fraction of {bandwidth / 1e9:.1f} GB/s; counted: the table of values, written once"
    emit(f"T {states:.0e} sweep, values written", fast, "triad", None, 5, note, ratio=table / fast / bandwidth)
