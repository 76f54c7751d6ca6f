r"""A rule without memory on a finite problem is a finite automaton: its rounds can be walked without asking it again.

What such a rule sees at depth k depends on the regime and the survival alone, and paths that agree in both are one
node. So the rule is asked once per node, on NumPy arrays, a depth at a time; what is left of a round is

    node, outcome -> next node,        outcome = (slot of the next candidate's regime, accepted or not),

and an outcome is drawn from a row of an *alias table* (Walker 1977): one coin and one look-up, whatever the number of
regimes. The start regime and the first candidate are one draw from their joint law, so node 0 is the start of a round;
a rule that stops before the first candidate is an outcome of it.

The rule's and the problem's numbers enter flat arrays of integers, not compiled code (`simulate.walk`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from mdp import entrants
from mdp.evaluate import observer
from mdp.policy import MERGE, Observation, Policy
from mdp.problem import FiniteProblem

__all__ = ["ALIAS_BITS", "NODE_BITS", "ROW_BITS", "Automaton", "Flag", "Level", "alias_rows", "asked",
           "automaton", "levels", "successors"]  # fmt: skip

MAX_ENTRIES = 2**21
NODE_BITS, ROW_BITS, ALIAS_BITS = 24, 20, 16


class Flag:
    """Bits of a table entry: behind it the round ends; its candidate is drafted; and of a clairvoyant rule, whether it
    stops instead of drafting it if it would be the first one rejected, or behind one; and if it would be accepted."""

    ENDS, DRAFTS, DROPS_REJECTED, DROPS_ACCEPTED = (np.uint64(1) << np.uint64(bit) for bit in (63, 62, 61, 60))


class Automaton(NamedTuple):
    """R rows of chance, N nodes, n outcomes: slot s rejected is 2 s, accepted 2 s + 1.

    An entry of `table` is a node, its row and `Flag`s. `regime` is what a slot draws, or where a rule stopped at once.
    Rounds start from `first_row` if they renew; else from `first_row` + 2 z + w, z the regime of the first rejected
    candidate (w = 0), or of the last one (w = 1). The first round of all starts from `begin_row`.
    """

    chance: UInt64[np.ndarray, "R n"]
    table: UInt64[np.ndarray, "N n/2"]
    regime: Int[np.ndarray, "N n/2"]
    first_row: int
    begin_row: int
    clairvoyant: bool


class Level(NamedTuple):
    """What the rule does with k candidates: states (regime, survival), which of them it stops in if the next candidate
    were rejected or accepted [n, 2], and the state of the next level that each slot leads to [n, slots]."""

    regime: Int[np.ndarray, " n"]
    drops: Bool[np.ndarray, "n 2"]
    child: Int[np.ndarray, "n slots"]


def automaton(
    problem: FiniteProblem, rule: Policy, start: Float[np.ndarray, " Z"], features: Mapping[str, np.ndarray]
) -> Automaton | None:
    """The rounds of a rule without memory, the first from `start`; None if it has too many nodes to be worth it.

    `features`: what else a candidate shows, by regime (`AcceptanceProcess.features`).
    """
    size, depth = problem.num_regimes, problem.max_candidates
    slot = successors(problem.transition)
    width = slot.shape[1]
    tree = levels(problem, rule, slot, features)
    if tree is None:
        return None
    root = tree[0]
    stopping = np.flatnonzero(root.drops.any(axis=1))
    slots = max(width, size + len(stopping))
    same = bool((problem.accept_prob == problem.accept_prob[0]).all())
    drafting = [~level.drops.all(axis=1) for level in tree]
    num_nodes = 1 + sum(int(goes.sum()) for goes in drafting[1:])
    starts = [start, problem.initial]
    if problem.rejection is not None and problem.bonus is not None:
        starts = [start, *np.stack([problem.rejection, problem.bonus], axis=1).reshape(2 * size, size)]
    num_rows = (1 if same else depth) * size + len(starts)
    if max(num_rows * 2, num_nodes) * slots > MAX_ENTRIES:
        return None

    mass = np.zeros((num_rows, slots, 2))
    going_on = np.take_along_axis(problem.transition, slot, axis=1)
    for k in range(1 if same else depth):
        accept = problem.accept_prob[k][slot]
        mass[k * size : (k + 1) * size, :width] = np.stack([going_on * (1 - accept), going_on * accept], axis=2)
    begin_row = num_rows - len(starts)
    accept = problem.accept_prob[0]
    for row, law in enumerate(starts, begin_row):
        joint = law[:, None, None] * problem.transition[:, :, None] * np.stack([1 - accept, accept], axis=1)
        dropped = joint * root.drops[:, None, :]
        mass[row, :size] = (joint - dropped).sum(axis=0)
        mass[row, size : size + len(stopping), 0] = dropped.sum(axis=(1, 2))[stopping]

    table = np.zeros((num_nodes, slots), dtype=np.uint64)
    regime = np.zeros((num_nodes, slots), dtype=np.int64)
    table[0] = Flag.ENDS
    regime[0, size : size + len(stopping)] = stopping
    first = 1
    for k, (level, goes) in enumerate(zip(tree[:-1], drafting[:-1], strict=True)):
        behind, on = tree[k + 1], drafting[k + 1]
        node = np.where(on, first + np.cumsum(on) - 1, 0)
        row = behind.regime + (0 if same else (k + 1) * size)
        entry = np.where(on, node | (row << NODE_BITS), 0).astype(np.uint64) | np.where(on, np.uint64(0), Flag.ENDS)
        entry |= Flag.DRAFTS
        if k == 0:  # one node for all roots: they lead to the same states, whichever of them drafts
            table[0, behind.regime], regime[0, :size] = entry, np.arange(size)
        else:
            rows = slice(first - int(goes.sum()), first)
            flags = np.where(level.drops[goes], np.array([Flag.DROPS_REJECTED, Flag.DROPS_ACCEPTED]), np.uint64(0))
            table[rows, :width] = entry[level.child[goes]] | flags.sum(axis=1, keepdims=True)
            regime[rows, :width] = slot[level.regime[goes]]
        first += int(on.sum())
    clairvoyant = "next_accepted" in entrants.needs(rule)
    return Automaton(
        alias_rows(mass.reshape(num_rows, 2 * slots)), table, regime, begin_row + 1, begin_row, clairvoyant
    )


def successors(transition: Float[np.ndarray, "Z Z"]) -> Int[np.ndarray, "Z slots"]:
    """The regimes that can follow each, in order; rows with fewer are filled up with others, of probability 0."""
    possible = transition > 0
    return np.argsort(~possible, axis=1, kind="stable")[:, : int(possible.sum(axis=1).max())]


def levels(
    problem: FiniteProblem, rule: Policy, slot: Int[np.ndarray, "Z slots"], features: Mapping[str, np.ndarray]
) -> list[Level] | None:
    """The rule asked at every state it can meet, a depth at a time; the last level drafts nothing."""
    reads, observe, tree, nodes = entrants.needs(rule), observer(problem, features), [], 0
    regime = np.arange(problem.num_regimes)
    survival = np.ones(len(regime)) if "survival" in reads else None
    for k in range(problem.max_candidates + 1):
        drops = np.ones((len(regime), 2), dtype=bool)
        if k < problem.max_candidates:
            seen = observe(k, regime, survival)
            drops = np.stack([asked(rule, seen, hit) for hit in (False, True)], axis=1)
        goes = ~drops.all(axis=1)
        child = np.zeros((len(regime), slot.shape[1]), dtype=np.int64)
        tree.append(Level(regime, drops, child))
        if not goes.any():
            return tree
        nodes += int(goes.sum())
        if nodes * slot.shape[1] > MAX_ENTRIES:
            return None
        following = slot[regime[goes]]
        key = following
        if survival is not None:
            product = survival[goes, None] * problem.accept_prob[k][following]
            key = np.rint(product * MERGE).astype(np.int64) * problem.num_regimes + following
        _, where, back = np.unique(key, return_index=True, return_inverse=True)
        child[goes] = back.reshape(following.shape)
        regime = following.ravel()[where]
        survival = None if survival is None else product.ravel()[where]
    return tree


def asked(rule: Policy, seen: Observation, hit: bool) -> Bool[np.ndarray, " n"]:
    """Whether the rule stops in each state, if the next candidate would be accepted and none was rejected (`hit`)."""
    seen = seen._replace(next_accepted=np.full(len(seen.regime), hit) if "next_accepted" in rule.needs else None)
    return np.broadcast_to(np.asarray(rule.stop(rule.init(), seen)[1], dtype=bool), seen.regime.shape)


def alias_rows(mass: Float[np.ndarray, "R n"]) -> UInt64[np.ndarray, "R n"]:
    """Alias tables of laws (rows, normalised here), all built at once: threshold above, the other outcome below.

    A coin falls in an even column, and stays there if what is left of it is under the threshold.
    """
    rows, size = np.arange(len(mass)), mass.shape[1]
    share = mass / mass.sum(axis=1, keepdims=True) * size
    order = np.argsort(share, axis=1, kind="stable")
    keep, other = np.ones_like(share), np.tile(np.arange(size), (len(mass), 1))
    poor, next_poor, rich = order[:, 0].copy(), np.ones(len(mass), dtype=int), np.full(len(mass), size - 1)
    for _ in range(size - 1):
        donor = order[rows, rich]
        own = share[rows, poor]
        keep[rows, poor], other[rows, poor] = np.minimum(own, 1.0), donor
        share[rows, donor] -= 1.0 - own
        # a donor that became poor is served next; else the poorest that has not been
        fell = share[rows, donor] < 1.0
        poor = np.where(fell, donor, order[rows, np.minimum(next_poor, size - 1)])
        rich, next_poor = rich - fell, next_poor + ~fell
        rich = np.maximum(rich, 0)
    top = np.uint64(2 ** (64 - ALIAS_BITS) - 1)
    threshold = np.minimum((keep * 2.0 ** (64 - ALIAS_BITS)).astype(np.uint64), top)
    other = np.where(keep >= 1.0, np.arange(size), other)
    return (threshold << np.uint64(ALIAS_BITS)) | other.astype(np.uint64)
