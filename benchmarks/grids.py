"""F, B1 and B2: ten thousand problems at a time, K = 64, Z = 8, float64."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import alternate, optional

from mdp.batch import member, round_times, stack
from mdp.many import solve_many
from mdp.problem import FiniteProblem
from mdp.relaxations import best_fixed_length, rejection_seen
from mdp.solve import solve

__all__ = ["bench_full", "bench_information"]

DINKELBACH = 1e-10


def grid(count: int) -> FiniteProblem:
    """Sticky regimes, acceptances .3 to .98, draft steps from .02 to .5 of a target call, V affine; stacked."""
    rng, size, depth = np.random.default_rng(0), 8, 64
    found = []
    for _ in range(count):
        stick = rng.uniform(0, 0.9)
        chain = stick * np.eye(size) + (1 - stick) * rng.dirichlet(np.ones(size), size=size)
        accept = np.tile(rng.uniform(0.3, 0.98, size), (depth, 1))
        draft_time = float(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
        verify_time = 1.0 + rng.uniform(0, 0.02) * np.arange(depth + 1)
        found.append(FiniteProblem(chain, accept, rng.dirichlet(np.ones(size)), draft_time, verify_time))
    return stack(found)


def bench_full(emit: Callable, quick: bool) -> None:
    """F: the full problem, both bounds to 1e-6."""
    count = 200 if quick else 10_000
    batch = grid(count)
    first = solve_many([member(batch, index) for index in range(64)]).seconds
    cpu = time.process_time()
    found = solve_many(batch)
    cpu = (time.process_time() - cpu) / count
    lower, upper = found.bounds.T
    unclosed = sum(status.name != "successful" for status in found.status)
    alone = [member(batch, index) for index in range(0, count, max(1, count // 5))][:5]
    for problem in alone:
        solve(problem)
    begun = time.perf_counter()
    for problem in alone:
        solve(problem)
    slow = (time.perf_counter() - begun) / len(alone)
    note = (
        f"per problem; {count} problems, {1e3 * cpu:.2f} ms of processor time each, {unclosed} not closed, "
        f"{found.num_refined[0]} refined, {found.num_refined[1]} one at a time, "
        f"widest {((upper - lower) / lower).max():.1e}, first call {first:.1f} s"
    )
    emit("F solve_many", found.seconds / count, "mdp.solve, one at a time", slow, 1, note)


def bench_information(emit: Callable, quick: bool) -> None:
    """B1 and B2, against numba loops and a plain vmap of the same algorithm on the same arrays."""
    count, runs = 1_000 if quick else 10_000, 3 if quick else 7
    batch = grid(count)
    times = round_times(batch)
    given = (batch.transition, batch.accept_prob, batch.initial, times)
    forms = (
        ("B1 best_fixed_length", lambda: best_fixed_length(batch).throughput, _fixed_loop(), None),
        ("B2 rejection_seen", lambda: rejection_seen(batch, tol=DINKELBACH).throughput, _seen_loop(), _seen_vmap()),
    )
    for name, ours, loops, plain in forms:
        peers: dict[str, Any] = {"plain vmap": plain} if plain else {}
        peers |= loops or {"numba loop": None}
        for peer, work in peers.items():
            if work is None:
                emit(name, alternate(ours, None, runs)[0] / count, peer, None, 0, "numba is not installed")
                continue
            fast, slow, found, other = alternate(ours, lambda work=work: work(*given), runs)
            error = np.abs(found / np.asarray(other) - 1).max()
            emit(name, fast / count, peer, slow / count, runs, f"per problem; {count} problems, differ by {error:.0e}")


def _fixed_loop() -> Any:
    numba = optional("numba")
    if numba is None:
        return None

    def loop(transition, accept_prob, initial, times):
        count, depth, size = accept_prob.shape
        best = np.empty(count)
        for b in numba.prange(count):
            alive, after = initial[b].copy(), np.empty(size)
            emitted, best[b] = 1.0, 1.0 / times[b, 0]
            for k in range(depth):
                for y in range(size):
                    total = 0.0
                    for z in range(size):
                        total += alive[z] * transition[b, z, y]
                    after[y] = total * accept_prob[b, k, y]
                for y in range(size):
                    alive[y] = after[y]
                    emitted += after[y]
                best[b] = max(best[b], emitted / times[b, k + 1])
        return best

    return _compiled(numba, loop)


def _seen_loop() -> Any:
    numba = optional("numba")
    if numba is None:
        return None

    def loop(transition, accept_prob, initial, times):
        count, depth, size = accept_prob.shape
        found = np.empty(count)
        for b in numba.prange(count):
            worth, time, tokens, later = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
            rate = 1.0 / times[b, 0]
            for _ in range(100):
                worth[:] = 0.0
                time[:] = 0.0
                for k in range(depth - 1, -1, -1):
                    price = times[b, k + 1] - times[b, k]
                    for z in range(size):
                        tokens[z] = accept_prob[b, k, z] * (1.0 + worth[z])
                        later[z] = accept_prob[b, k, z] * time[z]
                    for z in range(size):
                        gain, spent = -rate * price, price
                        for y in range(size):
                            gain += transition[b, z, y] * tokens[y]
                            spent += transition[b, z, y] * later[y]
                        worth[z] = max(gain, 0.0)
                        time[z] = spent if gain > 0 else 0.0
                lacking, mean = 1.0 - rate * times[b, 0], times[b, 0]
                for z in range(size):
                    lacking += initial[b, z] * worth[z]
                    mean += initial[b, z] * time[z]
                moved = lacking / mean
                rate += moved
                if abs(moved) <= DINKELBACH * rate:
                    break
            found[b] = rate
        return found

    return _compiled(numba, loop)


def _compiled(numba: Any, loop: Callable) -> dict[str, Callable]:
    return {
        "numba loop, all cores": numba.njit(parallel=True)(loop),
        "numba loop, all cores, fastmath": numba.njit(parallel=True, fastmath=True)(loop),
    }


def _seen_vmap() -> Callable:
    """The same as one would write it for one problem, under `vmap`."""

    def one(transition, accept_prob, initial, times):
        price = jnp.diff(times)

        def sweep(rate):
            def step(later, layer):
                accept_prob, price = layer
                gain = transition @ (accept_prob * (1.0 + later[0])) - rate * price
                time = transition @ (accept_prob * later[1]) + price
                return (jnp.maximum(gain, 0.0), jnp.where(gain > 0, time, 0.0)), None

            none = jnp.zeros_like(initial)
            (worth, time), _ = jax.lax.scan(step, (none, none), (accept_prob, price), reverse=True)
            return 1.0 + initial @ worth - rate * times[0], times[0] + initial @ time

        def body(carry):
            rate, _ = carry
            lacking, time = sweep(rate)
            return rate + lacking / time, jnp.abs(lacking / time)

        start = (1.0 / times[0], 1.0 / times[0])
        return jax.lax.while_loop(lambda carry: carry[1] > DINKELBACH * carry[0], body, start)[0]

    batched = jax.jit(jax.vmap(one))

    def work(*arrays):
        with jax.enable_x64(True):
            return np.asarray(batched(*arrays))

    return work
