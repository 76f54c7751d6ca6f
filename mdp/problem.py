r"""The stopping problem: an acceptance process, times and a coupling, lowered to one checked set of arrays.

Coupling says where the next round starts. *Renewal*: $z_0 \sim$ `initial`, afresh each round. *Persistent*: $z_0$ is
drawn from `rejection[z_i]` if candidate $i$ was the first one rejected, from `bonus[z_k]` if all $k$ were accepted
(`bonus[z_0]` for $k = 0$). A persistent problem must be *communicating*: from every start regime reachable from
`initial` every other one can be reached under some actions. Then the best throughput depends on neither the start
nor `initial`. Persistent problems also need $T(k) = k t_d + V(k)$ non-decreasing, the condition under which the
optimal policy is a threshold in survival for each (k, z) (theory, F1); renewal problems take any positive times.
Some processes bring their coupling along (`TokenPair`); the problem then names none.

Solvers, evaluation and the simulator see only `FiniteProblem`, never which process or cost it came from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse.csgraph import connected_components

from mdp.acceptance import (
    IID,
    MAX_HIDDEN,
    MAX_REGIMES,
    MAX_SYMBOLS,
    MAX_VOCABULARY,
    AcceptanceProcess,
    BetaMixture,
    FiniteChain,
    LogitAR,
    MarkovModulated,
    Observed,
    Position,
    StartLaws,
    TokenPair,
    square,
)
from mdp.chain import reachable
from mdp.cost import Affine, Cost, Overlapped, Roofline, Table
from mdp.keys import Key, describe

__all__ = ["FiniteProblem", "Persistent", "StoppingProblem", "cost_from_dict", "load", "loads", "schema", "start_graph"]

MAX_CANDIDATES = 1024
MAX_FILE_BYTES = 16 * 2**20
# T(k) may fall by this much, relatively, through rounding of equal times.
ROUNDING = 1e-12


class FiniteProblem(NamedTuple):
    """What solvers see. Z regimes, at most K candidates; `rejection` and `bonus` are None when rounds renew."""

    transition: Float[np.ndarray, "Z Z"]
    accept_prob: Float[np.ndarray, "K Z"]
    initial: Float[np.ndarray, " Z"]
    draft_time: float
    verify_time: Float[np.ndarray, " K+1"]
    rejection: Float[np.ndarray, "Z Z"] | None = None
    bonus: Float[np.ndarray, "Z Z"] | None = None

    @property
    def persistent(self) -> bool:
        return self.bonus is not None

    @property
    def num_regimes(self) -> int:
        return self.transition.shape[0]

    @property
    def max_candidates(self) -> int:
        return self.accept_prob.shape[0]

    @property
    def round_time(self) -> Float[np.ndarray, " K+1"]:
        """$T(k) = k t_d + V(k)$."""
        return np.arange(self.max_candidates + 1) * self.draft_time + self.verify_time

    @property
    def step_time(self) -> Float[np.ndarray, " K"]:
        """$c_k = T(k+1) - T(k) = t_d + V(k+1) - V(k)$: what one more candidate adds to the time of the round."""
        return self.draft_time + np.diff(self.verify_time)

    @property
    def next_accept_prob(self) -> Float[np.ndarray, "K Z"]:
        r"""$\bar a_k(z) = \sum_{z'} P(z, z') a_{k+1}(z')$ for k = 0..K-1."""
        return self.accept_prob @ self.transition.T


@dataclass(frozen=True)
class Persistent:
    """The coupling of rounds through regimes: row-stochastic [Z, Z] laws of the next start regime."""

    rejection: Annotated[
        np.ndarray, Key("[Z, Z]", "probability", 0, 1, "next start, by the regime first rejected", rows=True)
    ]
    bonus: Annotated[
        np.ndarray,
        Key("[Z, Z]", "probability", 0, 1, "next start, by the last regime if all are accepted", rows=True),
    ]
    kind = "persistent"

    def __post_init__(self) -> None:
        size = len(self.rejection) if isinstance(self.rejection, (list, tuple, np.ndarray)) else 0
        object.__setattr__(self, "rejection", square("coupling.rejection", self.rejection, size))
        object.__setattr__(self, "bonus", square("coupling.bonus", self.bonus, size))


@dataclass(frozen=True)
class StoppingProblem:
    """A process, its times and the most candidates a round may hold; `coupling=None` means that rounds renew.

    Raises:
        ValueError: naming the field, the value and what is allowed.

    Example:
        >>> problem = StoppingProblem(IID(0.8), Affine(draft_time=0.2, verify_time=1.0), max_candidates=4)
        >>> problem.lower().round_time
        array([1. , 1.2, 1.4, 1.6, 1.8])
    """

    acceptance: AcceptanceProcess
    cost: Cost
    max_candidates: int
    coupling: Persistent | None = None

    def __post_init__(self) -> None:
        depth = self.max_candidates
        if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or not 1 <= depth <= MAX_CANDIDATES:
            raise ValueError(f"max_candidates: must be a whole number in 1..{MAX_CANDIDATES}, got {depth!r}")
        self.unseen()

    def lower(self) -> FiniteProblem:
        """The arrays solvers work on; checked and cached.

        Raises:
            ValueError: if no finite chain equals the process (`acceptance.finite` is false).
        """
        return self._lowered

    def bracket(self, cells: int) -> tuple[FiniteProblem, FiniteProblem]:
        """Two finite problems whose best throughputs enclose this one's, for a continuous process with memory."""
        low, high = self.acceptance.bracket(int(self.max_candidates), cells)
        return self._checked(low), self._checked(high)

    def unseen(self) -> FiniteProblem:
        """The problem as `fixed` and `oracle` meet it, which look at no regime: continuous acceptances averaged."""
        if self.acceptance.finite:
            return self.lower()
        return self._checked(self.acceptance.unseen(int(self.max_candidates)))

    @cached_property
    def _lowered(self) -> FiniteProblem:
        return self._checked(self.acceptance.lower(int(self.max_candidates)))

    def _checked(self, chain: FiniteChain) -> FiniteProblem:
        depth = int(self.max_candidates)
        times = self.cost.verify_times(depth)
        finite = FiniteProblem(*chain, draft_time=self.cost.draft_time, verify_time=times)
        laws = self._start_laws()
        if laws is None:
            return finite
        if laws.bonus.shape != chain.transition.shape:
            raise ValueError(f"coupling.rejection: must be {len(chain.initial)} x {len(chain.initial)}")
        finite = finite._replace(rejection=laws.rejection, bonus=laws.bonus)
        falls = np.flatnonzero(np.diff(finite.round_time) < -ROUNDING * finite.round_time[:-1])
        if falls.size:
            raise ValueError(
                "cost: a persistent problem needs k * draft_time + V(k) non-decreasing, "
                f"it falls from k = {falls[0]} to {falls[0] + 1}"
            )
        graph, starts = start_graph(finite)
        count, _ = connected_components(graph[np.ix_(starts, starts)], connection="strong")
        if count > 1:
            raise ValueError(
                f"coupling: the start regimes fall into {count} classes that cannot all reach each other "
                "(the problem is not communicating)"
            )
        return finite

    def _start_laws(self) -> StartLaws | None:
        """The coupling: the process's own, or the one given for it, or None if rounds renew."""
        own = self.acceptance.start_laws()
        if self.coupling is None:
            return own
        if own is not None:
            raise ValueError(f"coupling: {self.acceptance.kind} brings its own, leave it out")
        if isinstance(self.acceptance, Observed):
            raise ValueError(
                "coupling.kind: persistent is not for observed: what verification reveals would be a belief about the "
                "next start, carried from round to round (a POMDP on round-start beliefs)"
            )
        if not isinstance(self.acceptance, MarkovModulated):
            raise ValueError(f"coupling.kind: persistent needs markov_modulated, not {self.acceptance.kind}")
        return StartLaws(self.coupling.rejection, self.coupling.bonus)

    def to_dict(self) -> dict[str, Any]:
        """The problem file's content; `loads(json.dumps(...))` gives the problem back."""
        coupling = {"kind": "renewal"} if self.coupling is None else _to_dict(self.coupling)
        out = {"acceptance": _to_dict(self.acceptance), "coupling": coupling, "cost": _to_dict(self.cost),
               "max_candidates": int(self.max_candidates)}  # fmt: skip
        if self.acceptance.start_laws() is not None:
            del out["coupling"]
        return out


def start_graph(problem: FiniteProblem) -> tuple[Bool[np.ndarray, "Z Z"], Bool[np.ndarray, " Z"]]:
    """Which start regime can follow which in a persistent problem, and which are reachable from `initial`.

    An edge z -> z' exists if some sequence of actions leads with positive probability from a round that
    starts in z to one that starts in z'.
    """
    assert problem.rejection is not None and problem.bonus is not None
    size = problem.num_regimes
    survived = np.eye(size, dtype=bool)  # [start, z_k]: all k candidates can be accepted and end in z_k
    edges = problem.bonus > 0
    for accept_prob in problem.accept_prob:
        drafted = _leads(survived, problem.transition)
        missed, kept = drafted & (accept_prob < 1), drafted & (accept_prob > 0)
        more = edges | _leads(missed, problem.rejection) | _leads(kept, problem.bonus)
        if (more == edges).all() and (kept == survived).all() and (problem.accept_prob == accept_prob).all():
            break  # and so on for ever
        edges, survived = more, kept
    return edges, reachable(edges, problem.initial > 0)


def _leads(reached: Bool[np.ndarray, "Z Z"], law: Float[np.ndarray, "Z Z"]) -> Bool[np.ndarray, "Z Z"]:
    """Where one draw from `law` leads; counts in floats, for which matrix products are fast."""
    return reached.astype(np.float32) @ (law > 0).astype(np.float32) > 0


def _to_dict(part: Any) -> dict[str, Any]:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {"kind": part.kind, **{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}}


ACCEPTANCE = {cls.kind: cls for cls in (IID, Position, BetaMixture, MarkovModulated, Observed, LogitAR, TokenPair)}
COST = {cls.kind: cls for cls in (Affine, Table, Roofline, Overlapped)}


def _part(name: str, value: Any, kinds: Mapping[str, type], default: str | None = None) -> Any:
    """One object of the problem file: its `kind` chooses the class, the other keys are its fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be an object, got {value!r:.60}")
    kind = value.get("kind", default)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{name}.kind: must be one of {', '.join(kinds)}, got {kind!r:.60}")
    cls, given = kinds[kind], {key: item for key, item in value.items() if key != "kind"}
    _check_keys(name, given, fields(cls))
    return cls(**given)


def _check_keys(name: str, given: Mapping[str, Any], allowed: Any) -> None:
    names = [f.name for f in allowed]
    for key in given:
        if key not in names:
            raise ValueError(f"{name}.{key}: unknown key; allowed are {', '.join(names) or 'none'}")
    for f in allowed:
        if f.name not in given and f.default is f.default_factory:  # both are MISSING: no default
            raise ValueError(f"{name}.{f.name}: missing")


@dataclass(frozen=True)
class _Renewal:
    kind = "renewal"


COUPLING = {"renewal": _Renewal, "persistent": Persistent}


def cost_from_dict(value: Any) -> Cost:
    """The `cost` object of a problem file.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    return _part("cost", value, COST)


def from_dict(data: Any) -> StoppingProblem:
    """A problem from the content of a problem file.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    if not isinstance(data, dict):
        raise ValueError(f"the problem must be an object, got {data!r:.60}")
    keys = ("acceptance", "coupling", "cost", "max_candidates")
    for key in data:
        if key not in keys:
            raise ValueError(f"{key}: unknown key; allowed are {', '.join(keys)}")
    for key in keys:
        if key not in data and key != "coupling":
            raise ValueError(f"{key}: missing")
    acceptance = _part("acceptance", data["acceptance"], ACCEPTANCE)
    if "coupling" in data and acceptance.start_laws() is not None:
        raise ValueError(f"coupling: {acceptance.kind} brings its own, leave it out")
    coupling = _part("coupling", data.get("coupling", {"kind": "renewal"}), COUPLING, default="renewal")
    return StoppingProblem(
        acceptance=acceptance,
        cost=cost_from_dict(data["cost"]),
        max_candidates=data["max_candidates"],
        coupling=coupling if isinstance(coupling, Persistent) else None,
    )


def parse_json(text: str) -> Any:
    """Strict JSON: no NaN or Infinity, no key twice, bounded nesting.

    Raises:
        ValueError: saying what is wrong.
    """

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a number in JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"{twice}: key given twice")
        return out

    try:
        return json.loads(text, parse_constant=constant, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at line {error.lineno})") from None


def loads(text: str) -> StoppingProblem:
    """A problem from JSON text.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    return from_dict(parse_json(text))


def load(path: str | Path) -> StoppingProblem:
    """A problem from a file of at most 16 MB.

    Raises:
        ValueError: one line that names the file, the field, the value and what is allowed.
    """
    try:
        return loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_text(path: str | Path) -> str:
    """The text of a file of bounded size.

    Raises:
        ValueError: if it cannot be read, is too large or is not UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise ValueError(error.strerror or "cannot be read") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None


def schema() -> dict[str, Any]:
    """Every kind the problem file knows, with its keys; under `keys` what each of them
    holds (`mdp.keys`), under `most` the longest axes."""
    kinds = {"acceptance": ACCEPTANCE, "coupling": COUPLING, "cost": COST}
    keys = {part: {kind: describe(cls) for kind, cls in known.items()} for part, known in kinds.items()}
    return {
        **{part: {kind: list(described) for kind, described in known.items()} for part, known in keys.items()},
        "max_candidates": [1, MAX_CANDIDATES],
        "most": {"Z": MAX_REGIMES, "Z of observed": MAX_HIDDEN, "O": MAX_SYMBOLS, "n": MAX_VOCABULARY},
        "keys": keys,
    }
