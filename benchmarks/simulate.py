r"""How fast rounds are simulated: against NumPy, numba and the price of a random number, on the same work.

    python benchmarks/simulate.py [--quick] [--json]

*Sim a*: independent acceptances .8, fixed length 8. *Sim b*: eight sticky regimes, stop when S * abar(z) <= .25 or at
32 candidates. Ours is `simulate.rounds.simulate` as users call it, tallies and standard errors included. Peers play the
same rounds from their own coins, and must agree with the exact block efficiency within 5 standard errors:

- threefry: `jax.random.uniform`, one a round and nothing else: the floor;
- K uniforms: JAX, one coin a candidate, all K of them;
- NumPy loop: round by round; NumPy: all rounds at once, those that have stopped taken out after each candidate
  (`compacted`), with NumPy's PCG64 or with the same Threefry that ours draws from;
- numba: two threads, alias tables, the same Threefry.

Then the figures a user waits for: 30 policies on 1e6 rounds of one process, and 30 policies replayed on a trace of
50,000 tokens. Turns alternate, medians, compilation apart; ratio = peer_s / ours_s.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.append(sys.path.pop(0))  # this file has the package's name, and its folder comes first

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from measure import alternate, optional, options, printer

from mdp.acceptance import IID, MarkovModulated
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.policy import LookaheadThreshold
from mdp.problem import StoppingProblem
from mdp.trace import Trace
from simulate.coins import ROTATIONS, ROUNDS, words
from simulate.replay import replay
from simulate.rounds import simulate

COST = Affine(draft_time=0.2, verify_time=1.0)
SIM_A = StoppingProblem(IID(0.8), COST, 8)
THRESHOLD, DEPTH, SIZE = 0.25, 32, 8
CHUNK = 2**20


def sim_b() -> StoppingProblem:
    rng = np.random.default_rng(0)
    transition = 0.7 * np.eye(SIZE) + 0.3 * rng.dirichlet(np.ones(SIZE), SIZE)
    return StoppingProblem(
        MarkovModulated(transition, np.linspace(0.3, 0.97, SIZE), np.full(SIZE, 1 / SIZE)), COST, DEPTH
    )


def main() -> None:
    args = options(__doc__ or "", ["iid", "regimes", "many"])
    emit, (rounds, runs) = printer(args.json), (2**21, 3) if args.quick else (2**24, 7)
    for name, part in (("iid", iid), ("regimes", regimes), ("many", many)):
        if args.only in (None, name):
            part(emit, rounds, runs)


def race(emit: Callable, name: str, ours: Callable, peer: str, theirs: Callable, rounds: int, runs: int) -> float:
    """A line, and the block efficiency that the peer found."""
    ours_s, peer_s, _, accepted = alternate(ours, theirs, runs)
    assert peer_s is not None
    emit(name, ours_s, peer, peer_s, runs, f"{rounds / ours_s / 1e6:.3g} M rounds/s; {rounds / peer_s / 1e6:.3g}")
    return 1.0 + float(accepted) / rounds


def iid(emit: Callable, rounds: int, runs: int) -> None:
    """Sim a."""
    ours = partial(simulate, SIM_A, ["fixed:8"], rounds=rounds, key=0)
    exact = evaluate(SIM_A, "fixed:8").tally.block_efficiency

    @partial(jax.jit, static_argnums=1)
    def floor(key, size):
        return jr.uniform(key, (size,)).sum()

    @partial(jax.jit, static_argnums=1)
    def k_uniforms(key, size):
        """Accepted candidates of all rounds, a chunk at a time."""

        def chunk(key):
            return jnp.cumprod(jr.uniform(key, (CHUNK, 8)) < 0.8, axis=1).sum()

        return jax.lax.map(chunk, jr.split(key, size // CHUNK)).sum()

    def plain(size):
        rng, accepted = np.random.default_rng(0), 0
        for _ in range(size):
            k = 0
            while k < 8 and rng.random() < 0.8:
                k += 1
            accepted += k
        return accepted

    def vectorised(size):
        rng = np.random.default_rng(0)
        draws = (np.minimum(rng.geometric(0.2, CHUNK) - 1, 8).sum() for _ in range(size // CHUNK))
        return sum(int(draw) for draw in draws)

    floor_peer = lambda: floor(jr.key(0), rounds).block_until_ready()  # noqa: E731
    race(emit, "sim_a", ours, "threefry, one uniform a round (the floor)", floor_peer, rounds, runs)
    for peer, play in (
        ("JAX, K uniforms a round", lambda: int(k_uniforms(jr.key(0), rounds))),
        ("NumPy geometric, PCG64", partial(vectorised, rounds)),
    ):
        found = race(emit, "sim_a", ours, peer, play, rounds, runs)
        assert abs(found - exact) < 15 / rounds**0.5, f"{peer} plays something else"
    few = rounds // 2**10
    ours_s, peer_s, _, _ = alternate(partial(simulate, SIM_A, ["fixed:8"], rounds=few, key=0), partial(plain, few), 1)
    emit("sim_a", ours_s, "NumPy loop", peer_s, 1, f"{few} rounds")


def regimes(emit: Callable, rounds: int, runs: int) -> None:
    """Sim b."""
    problem = sim_b()
    rule = LookaheadThreshold(1.0 - THRESHOLD)
    ours = partial(simulate, problem, [rule], rounds=rounds, key=0)
    exact = evaluate(problem, rule).tally.block_efficiency
    (sample,) = ours().policies
    assert abs(sample.total.block_efficiency - exact) < 15 / rounds**0.5
    peers = {
        "NumPy compacted, PCG64": partial(compacted, problem, rounds, pcg64()),
        "NumPy compacted, Threefry": partial(compacted, problem, rounds, threefry()),
    }
    numba = optional("numba")
    if numba is None:
        emit("sim_b", float("nan"), "numba", None, 0, "not installed")
    else:
        peers["numba alias, Threefry, 2 threads"] = partial(numba_walk(numba, problem), rounds)
    for peer, play in peers.items():
        found = race(emit, "sim_b", ours, peer, play, rounds, runs if "numba" in peer else min(runs, 3))
        assert abs(found - exact) < 15 / rounds**0.5, f"{peer} plays something else"


def pcg64():
    rng = np.random.default_rng(0)
    return lambda size: rng.random((2, size))


def threefry():
    """The same hash as ours, in NumPy, a fresh counter a call."""
    calls = iter(range(2**32))

    def draw(size):
        key = np.uint32(1), np.uint32(2)
        with np.errstate(over="ignore"):
            both = words(key, (np.arange(size, dtype=np.uint32), np.full(size, next(calls), dtype=np.uint32)))
        return np.stack(both) * 2.0**-32

    return draw


def compacted(problem: StoppingProblem, rounds: int, draw) -> int:
    """Accepted candidates of all rounds, a chunk at a time; rounds that stop are taken out."""
    finite, total = problem.lower(), 0
    cumulative = np.cumsum(finite.transition, axis=1)
    cumulative[:, -1] = 1.0
    flat = (cumulative + np.arange(SIZE)[:, None]).ravel()
    accept, ahead = finite.accept_prob[0], finite.next_accept_prob[0]
    for _ in range(rounds // CHUNK):
        regime = (draw(CHUNK)[0] * SIZE).astype(np.int64)
        survival, whole = np.ones(CHUNK), np.ones(CHUNK, dtype=bool)
        for _ in range(DEPTH):
            goes = survival * ahead[regime] > THRESHOLD
            regime, survival, whole = regime[goes], survival[goes], whole[goes]
            if not len(regime):
                break
            coin, other = draw(len(regime))
            regime = np.searchsorted(flat, regime + coin, side="right") - regime * SIZE
            survival = survival * accept[regime]
            whole &= other < accept[regime]
            total += int(whole.sum())
    return total


def numba_walk(numba, problem: StoppingProblem):
    """Round by round in machine code: alias tables, survival as a number."""
    from simulate.automaton import ALIAS_BITS, alias_rows

    finite = problem.lower()
    rows = alias_rows(np.vstack([finite.transition, finite.initial]))
    threshold = (rows >> np.uint64(ALIAS_BITS)) / 2.0 ** (64 - ALIAS_BITS)
    other = (rows & np.uint64(2**ALIAS_BITS - 1)).astype(np.int64)
    accept, ahead = finite.accept_prob[0].copy(), finite.next_accept_prob[0].copy()

    hash_ = numba.njit(inline="always")(threefry_scalar)

    @numba.njit(parallel=True, fastmath=False)
    def play(rounds, threads):
        accepted = np.zeros(threads, dtype=np.int64)
        for thread in numba.prange(threads):
            count = 0
            for r in range(rounds // threads):
                coin, _ = hash_(np.uint32(thread), np.uint32(7), np.uint32(r), np.uint32(DEPTH))
                place = coin * 2.0**-32 * SIZE
                column = int(place)
                z = column if place - column < threshold[SIZE, column] else other[SIZE, column]
                survival, whole, k = 1.0, True, 0
                while k < DEPTH and survival * ahead[z] > THRESHOLD:
                    coin, second = hash_(np.uint32(thread), np.uint32(7), np.uint32(r), np.uint32(k))
                    place = coin * 2.0**-32 * SIZE
                    column = int(place)
                    z = column if place - column < threshold[z, column] else other[z, column]
                    survival *= accept[z]
                    whole = whole and second * 2.0**-32 < accept[z]
                    count += whole
                    k += 1
            accepted[thread] = count
        return accepted.sum()

    numba.set_num_threads(2)
    return lambda rounds: int(play(rounds, 2))


def threefry_scalar(k0, k1, c0, c1):
    """Threefry-2x32-13 on scalars, for numba."""
    k2 = np.uint32(k0 ^ k1 ^ np.uint32(0x1BD11BDA))
    x0, x1 = np.uint32(c0 + k0), np.uint32(c1 + k1)
    for i in range(ROUNDS):
        turn = ROTATIONS[i % 8]
        x0 = np.uint32(x0 + x1)
        x1 = np.uint32((x1 << np.uint32(turn)) | (x1 >> np.uint32(32 - turn)))
        x1 = np.uint32(x1 ^ x0)
        if i == 3:
            x0, x1 = np.uint32(x0 + k1), np.uint32(x1 + k2 + np.uint32(1))
        elif i == 7:
            x0, x1 = np.uint32(x0 + k2), np.uint32(x1 + k0 + np.uint32(2))
        elif i == 11:
            x0, x1 = np.uint32(x0 + k0), np.uint32(x1 + k1 + np.uint32(3))
    return x0, x1


def many(emit: Callable, rounds: int, runs: int) -> None:
    """What a user waits for: 30 policies on 1e6 rounds, and on a trace."""
    chain = MarkovModulated([[0.9, 0.1], [0.3, 0.7]], [0.95, 0.4], [0.8, 0.2])
    policies = [f"fixed:{k}" for k in range(13)] + [f"rejection:{h / 20}" for h in range(9)]
    policies += [f"lookahead:{h / 20}" for h in range(8)]
    work = partial(simulate, StoppingProblem(chain, COST, 12), policies, rounds=10**6, key=0)
    ours_s, _, _, _ = alternate(work, None, min(runs, 3))
    emit("simulate, 30 policies x 1e6 rounds", ours_s, None, None, min(runs, 3), "goal 20 s")
    trace = recorded(500, 100)
    ours_s, _, _, _ = alternate(partial(replay, trace, policies, cost=COST), None, min(runs, 3))
    emit(f"replay, 30 policies x {trace.num_positions} tokens", ours_s, None, None, min(runs, 3), "goal 10 s")


def recorded(requests: int, length: int) -> Trace:
    """A trace of a draft and a target over 8 tokens, made by the tests' own builder."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import chains  # type: ignore[import-not-found]

    return chains.record(chains.random_pair(3), 5, num_requests=requests, limit=length, depth=12)


if __name__ == "__main__":
    main()
