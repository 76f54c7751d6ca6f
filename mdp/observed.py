r"""The stopping problem with hidden regimes: a tree of symbol histories, bounded from both sides."""

import time
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree
from jaxtyping import Float

from mdp.belief import branch, merge, _FACTORS
CELLBITS=16
OVER=1.0
SAW=1

from mdp.certificate import certificate
from mdp.problem import FiniteProblem

KNOTS = 1025
SMALL = 4096


class Layer(NamedTuple):
    points: Any
    mass: Any
    ceiling: Any  # [n] upper value
    opened: Any  # [m]
    gain: Any
    chance: Any
    child: Any


def prices(problem):
    return problem.draft_time + np.diff(problem.verify_time)


def seen_values(problem, rate):
    grid = np.linspace(0, 1, KNOTS)
    depth, size = problem.accept_prob.shape
    out = np.zeros((depth + 1, size, KNOTS))
    for k in range(depth - 1, -1, -1):
        a = problem.accept_prob[k]
        after = np.stack([grid * a[y] + np.interp(grid * a[y], grid, out[k + 1, y]) for y in range(size)])
        out[k] = np.maximum(problem.transition @ after - rate * prices(problem)[k], 0)
    return out


def seen_at(values, share, y):
    at = np.minimum(share, 1.0) * (KNOTS - 1)
    cell = np.minimum(at.astype(np.int64), KNOTS - 2)
    part = at - cell
    row = values[y]
    return row[cell] * (1 - part) + row[cell + 1] * part


def relaxed(problem, seen, k, points, rate):
    size = problem.num_regimes
    kept = points[:, :size] @ problem.transition * problem.accept_prob[k]
    moved = points[:, size:] @ problem.transition
    out = kept.sum(axis=1) - rate * prices(problem)[k] * moved.sum(axis=1)
    share = np.divide(kept, moved, out=np.zeros_like(kept), where=moved > 0)
    for y in range(size):
        out += moved[:, y] * seen_at(seen[k + 1], share[:, y], y)
    return out


def blind(problem, k, rate):
    """open-loop alphas at depth k: e [m, Z], t [m]."""
    depth = problem.max_candidates
    a = problem.accept_prob
    e = np.zeros((depth - k, problem.num_regimes))
    flow = None
    # vector of emitted from going m more, as function of w: sum_j P D P D 1
    # compute forward: M = P D_{k+1}; e_m = sum_{j<=m} M_1..M_j 1
    mat = np.eye(problem.num_regimes)
    tot = np.zeros(problem.num_regimes)
    for j in range(k, depth):
        mat = mat @ (problem.transition * a[j])
        tot = tot + mat.sum(axis=1)
        e[j - k] = tot
    return e, np.cumsum(prices(problem)[k:])


def grow(problem, observation, rate, limit, slack):
    depth = problem.max_candidates
    seen = seen_values(problem, rate)
    points = np.concatenate([problem.initial] * 2)[None]
    mass = np.ones(1)
    layers = []
    for k in range(depth):
        ceiling = relaxed(problem, seen, k, points, rate)
        opened = np.flatnonzero(ceiling > 0)
        ceiling = np.maximum(ceiling, 0)
        if len(opened) > SMALL:
            e, t = blind(problem, k, rate)
            low = np.maximum((points[opened, : problem.num_regimes] @ e.T - rate * t).max(axis=1), 0)
            gap = mass[opened] * np.maximum(ceiling[opened] - low, 0)
            order = np.argsort(-gap)
            tail = np.cumsum(gap[order][::-1])[::-1]
            count = max(SMALL, int(np.searchsorted(-tail, -slack / depth)))
            order = order[:count]
            opened, gap = opened[order], gap[order]
            if len(opened) > limit:
                x = points[opened]
                for bits in range(CELLBITS, 0, -1):
                    key = (np.rint(x * 2.0**bits).astype(np.int64).view(np.uint64) * _FACTORS[: x.shape[1]]).sum(axis=1)
                    _, first, group = np.unique(key, return_index=True, return_inverse=True)
                    if len(first) <= OVER * limit:
                        break
                g = np.bincount(group, gap)
                m = np.bincount(group, mass[opened])
                pick = np.argsort(-g)[:limit]
                mass = mass.copy(); mass[opened[first]] = m
                opened = opened[first[pick]]
            opened = np.sort(opened)
        if len(opened) == 0:
            layers.append(Layer(points, mass, ceiling, opened, None, None, None))
            break
        b = branch(problem, observation, k, points[opened])
        n, o = b.chance.shape
        flat = b.point.reshape(n * o, points.shape[1])
        first, group = merge(flat)
        new_mass = np.bincount(group, (mass[opened][:, None] * b.chance).ravel(), minlength=len(first))
        layers.append(Layer(points, mass, ceiling, opened, b.gain, b.chance, group.reshape(n, o)))
        points, mass = flat[first], new_mass
        if len(opened) == 0:
            break
    if len(layers) == depth:
        layers.append(Layer(points, mass, np.zeros(len(points)), np.zeros(0, int), None, None, None))
    return layers


def hull(problem, seen, k, rate, at, columns, cost):
    """at [n,d]; columns [n,m,d]; cost [n,m]."""
    n, m, d = columns.shape
    size = d // 2
    eye = np.eye(size)
    corner = np.maximum(relaxed(problem, seen, k, np.concatenate([eye, eye], axis=1), rate), 0)
    basis_cost = np.tile(np.append(corner, np.zeros(size)), (n, 1))
    table = np.concatenate([columns, at[:, None]], axis=1).copy()  # [n, m+1, d]; last is lambda
    who = np.full((n, d), -1)
    rows = np.arange(n)
    for _ in range(PIVOTS):
        reduced = cost - (table[:, :m] * basis_cost[:, None]).sum(axis=2)
        j = reduced.argmin(axis=1)
        active = reduced[rows, j] < -1e-12
        if not active.any():
            break
        col = table[rows, j]  # [n,d]
        ok = col > 1e-9
        ratio = np.where(ok, table[:, m] / np.where(ok, col, 1), np.inf)
        i = ratio.argmin(axis=1)
        active &= np.isfinite(ratio[rows, i])
        r = np.flatnonzero(active)
        if len(r) == 0: break
        i, j, col = i[r], j[r], col[r]
        prow = table[r, :, i] / col[np.arange(len(r)), i][:, None]  # [nr, m+1]
        T = table[r]
        T -= col[:, None, :] * prow[:, :, None]
        T[np.arange(len(r)), :, i] = prow
        table[r] = T
        who[r, i] = j
        basis_cost[r, i] = cost[r, j]
    lam = np.zeros((n, m))
    for i in range(d):
        on = who[:, i] >= 0
        lam[rows[on], who[on, i]] = np.maximum(table[on, m, i], 0)
    lam *= 1 - 1e-12
    rest = at - (lam[:, :, None] * columns).sum(axis=1)
    bad = rest.min(axis=1) < 0
    full = np.concatenate([rest[:, :size], rest[:, :size] + rest[:, size:]], axis=1)
    full = np.maximum(full, 0)
    out = (lam * cost).sum(axis=1) + np.maximum(relaxed(problem, seen, k, full, rate), 0)
    return np.where(bad, np.inf, out)


PIVOTS = 8


def back(problem, observation, layers, rate, near=0, verbose=False):
    seen = seen_values(problem, rate)
    size = problem.num_regimes
    depth = problem.max_candidates
    P = problem.transition
    c = prices(problem)
    up = None
    for k in range(len(layers) - 1, -1, -1):
        L = layers[k]
        n = len(L.points)
        alpha = np.zeros((n, 3 * size))  # e, t, d
        u = L.ceiling.copy()
        if k < depth:
            e, t = blind(problem, k, rate)
            val = L.points[:, :size] @ e.T - rate * t
            best = val.argmax(axis=1)
            go = val[np.arange(n), best] > 0
            alpha[go, :size] = e[best[go]]
            alpha[go, size : 2 * size] = t[best[go]][:, None]
            alpha[go, 2 * size :] = (best[go] + 1.0)[:, None]
        if len(L.opened):
            nxt = later[L.child]  # [m,O,3Z]
            m, o = L.chance.shape
            agg = np.einsum("moaz,zo->maz", nxt.reshape(m, o, 3, size), observation)
            agg[:, 0] = problem.accept_prob[k] * (1 + agg[:, 0])
            agg[:, 1] += c[k]
            agg[:, 2] += 1
            new = (agg @ P.T).reshape(m, 3 * size)
            x = L.points[L.opened]
            value = (new[:, :size] * x[:, :size]).sum(1) - rate * (new[:, size : 2 * size] * x[:, size:]).sum(1)
            old = alpha[L.opened]
            oldv = (old[:, :size] * x[:, :size]).sum(1) - rate * (old[:, size : 2 * size] * x[:, size:]).sum(1)
            better = value >= np.maximum(oldv, 0)
            alpha[L.opened] = np.where(better[:, None], new, old)
            uu = L.gain - rate * c[k] + (L.chance * up[L.child]).sum(1)
            u[L.opened] = np.minimum(u[L.opened], np.maximum(uu, 0))
        if near and 0 < len(L.opened) < n and k < depth:
            closed = np.ones(n, bool); closed[L.opened] = False
            x = L.points
            val = (alpha[:, :size] * x[:, :size]).sum(1) - rate * (alpha[:, size:2*size] * x[:, size:]).sum(1)
            todo = np.flatnonzero(closed & (u > np.maximum(val, 0) + 1e-12))
            if len(todo):
                y = x[todo]
                _, idx = cKDTree(x[L.opened]).query(y, k=min(near, len(L.opened)))
                idx = idx.reshape(len(todo), -1)
                cone = np.concatenate([x[:, :size], x[:, size:] - x[:, :size]], axis=1)
                oldl, oldu = np.maximum(val[todo],0).copy(), u[todo].copy()
                uu = hull(problem, seen, k, rate, cone[todo], cone[L.opened[idx]], u[L.opened[idx]])
                u[todo] = np.minimum(u[todo], uu)
                for j in range(SAW):
                    i = L.opened[idx[:, j]]
                    den = cone[i]
                    ratio = np.where(den > 0, np.maximum(cone[todo],0) / np.where(den > 0, den, 1), np.inf).min(1)
                    rest = y - ratio[:, None] * x[i]
                    uu = ratio * u[i] + np.maximum(relaxed(problem, seen, k, rest, rate), 0)
                    u[todo] = np.minimum(u[todo], uu)
                for j in range(idx.shape[1]):
                    i = L.opened[idx[:, j]]
                    a = alpha[i]
                    v = (a[:, :size] * y[:, :size]).sum(1) - rate * (a[:, size:2*size] * y[:, size:]).sum(1)
                    better = v > np.maximum(val[todo], 0)
                    val[todo[better]] = v[better]
                    alpha[todo[better]] = a[better]
                if verbose:
                    m = L.mass[todo]
                    print('   ', k, len(todo), 'low', (m*oldl).sum(), (m*np.maximum(val[todo],0)).sum(), 'up', (m*oldu).sum(), (m*u[todo]).sum())
        later, up = alpha, u
    x = layers[0].points[0]
    e, t, d = later[0, :size] @ x[:size], later[0, size : 2 * size] @ x[size:], later[0, 2 * size :] @ x[size:]
    return 1 + e, problem.verify_time[0] + t, d, 1 + up[0] - rate * problem.verify_time[0]


def solve_hidden(problem, observation, tol=1e-6, limit=50_000, verbose=False, near=4):
    start = time.perf_counter()
    e, t = blind(problem, 0, 0.0)
    rates = np.append(1.0, 1 + problem.initial @ e.T) / np.append(problem.verify_time[0], problem.verify_time[0] + t)
    rate = rates.max()
    lower, upper = rate, np.inf
    for it in range(30):
        coarse = it < 4
        layers = grow(problem, observation, rate, SMALL if coarse else limit, tol * 0.5 * rate * problem.round_time.min())
        em, ti, dr, high = back(problem, observation, layers, rate, 0 if coarse else near, verbose)
        new = em / ti
        lower = max(lower, new)
        _, up = certificate(rate, 0.0, high, problem.round_time, 0.0, problem.num_regimes)
        upper = min(upper, up)
        if verbose:
            print(it, rate, new, lower, upper, (upper - lower) / lower, [len(l.points) for l in layers], round(time.perf_counter() - start, 2))
        if upper - lower <= tol * lower or (not coarse and new <= rate * (1 + 1e-15)):
            break
        rate = lower
    return lower, upper
