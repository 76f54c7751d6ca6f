r"""Times: what a draft step and a verification cost.

A round that drafts $k$ candidates takes $T(k) = k\,t_d + V(k)$: $k$ draft steps and one target call that scores $k + 1$
positions. $V(0)$ is plain decoding and the usual unit. Any unit will do as long as it is one; throughput is in tokens
per that unit and speedup $= \rho V(0)$ has none.

What is solved depends on $T$ alone, since a round that stops after k candidates has paid $k\,t_d$ on the way and pays
$V(k) = T(k) - k\,t_d$ at the end. So $V(k)$ may be *effective*: where drafting and verification overlap it is the part
of the verification that drafting does not hide, and it may be 0 for k > 0. Needed are $t_d > 0$, $V(0) > 0$ and
$V(k) \ge 0$; then every $T(k) > 0$.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float

from mdp.keys import Key

__all__ = ["Affine", "Cost", "Overlapped", "Roofline", "Table"]

MAX_COUNT = 2**40
SHORTEST, LONGEST = 1e-100, 1e100
"""No clock needs more; sums and products of such times stay finite in float64."""

Step = Annotated[float, Key("number", "time", SHORTEST, LONGEST, "one draft step")]


class Cost:
    """Base of all times; `kind` is the name in the problem file. `draft_time` is $t_d$."""

    kind: ClassVar[str]
    draft_time: float

    def verify_times(self, max_candidates: int) -> Float[np.ndarray, " K+1"]:
        """$V(0..K)$.

        Raises:
            ValueError: if the cost model has no value for that many candidates.
        """
        raise NotImplementedError

    def round_times(self, max_candidates: int) -> Float[np.ndarray, " K+1"]:
        """$T(k) = k t_d + V(k)$ for k = 0..K."""
        return np.arange(max_candidates + 1) * self.draft_time + self.verify_times(max_candidates)


def _time(name: str, value: object, zero: bool = False) -> float:
    good = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    least = 0.0 if zero else SHORTEST
    if not good or not least <= value <= LONGEST:  # type: ignore[operator]
        sign = ">=" if zero else ">"
        raise ValueError(f"{name}: must be a finite number {sign} 0 (in {least:g}..{LONGEST:g}), got {value!r:.60}")
    return float(value)  # type: ignore[arg-type]


def _whole(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= MAX_COUNT:
        raise ValueError(f"{name}: must be a whole number in {least}..{MAX_COUNT}, got {value!r:.60}")
    return int(value)


@dataclass(frozen=True)
class Affine(Cost):
    r"""$V(k) = $ `verify_time` + `verify_slope` $\cdot\, k$; slope 0 is the constant verification time of the paper."""

    draft_time: Step
    verify_time: Annotated[float, Key("number", "time", SHORTEST, LONGEST, "V(0): a target call with no candidate")]
    verify_slope: Annotated[float, Key("number", "time", 0, LONGEST, "what each candidate adds to V")] = 0.0
    kind = "affine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_time", _time("cost.draft_time", self.draft_time))
        object.__setattr__(self, "verify_time", _time("cost.verify_time", self.verify_time))
        object.__setattr__(self, "verify_slope", _time("cost.verify_slope", self.verify_slope, zero=True))

    def verify_times(self, max_candidates: int) -> np.ndarray:
        return self.verify_time + self.verify_slope * np.arange(max_candidates + 1)


@dataclass(frozen=True)
class Table(Cost):
    """$V(0), .., V(K)$ as measured; steps and dips are kept."""

    draft_time: Step
    verify_time: Annotated[
        np.ndarray, Key("[K+1]", "time", SHORTEST, LONGEST, "V(0)..V(K): a target call with so many candidates")
    ] = field(hash=False)
    kind = "table"

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_time", _time("cost.draft_time", self.draft_time))
        values = self.verify_time
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) == 0:
            raise ValueError(f"cost.verify_time: must be a list of times V(0)..V(K), got {values!r}")
        object.__setattr__(self, "verify_time", np.array([_time("cost.verify_time", value) for value in values]))

    def verify_times(self, max_candidates: int) -> np.ndarray:
        if len(self.verify_time) != max_candidates + 1:
            raise ValueError(
                f"cost.verify_time: must have max_candidates + 1 = {max_candidates + 1} entries, "
                f"got {len(self.verify_time)}"
            )
        return self.verify_time


@dataclass(frozen=True)
class Roofline(Cost):
    r"""Times from the hardware: a pass takes the longer of moving its bytes and doing its arithmetic, in seconds.

    A pass of one model over `batch_size` requests of `context_length` tokens each, `positions` new ones per request:

    $$\text{overhead} + \max\Big\{\frac{\text{weight bytes} + \text{batch} \cdot \text{context} \cdot
      \text{KV bytes}}{\text{bandwidth}},\; \frac{\text{batch} \cdot \text{positions} \cdot \text{flops}}
      {\text{peak}}\Big\}.$$

    A draft step has one position, a verification of k candidates k + 1. $V$ is constant up to the candidate at which
    arithmetic takes over and affine from there: non-decreasing and convex. The whole batch drafts and is verified
    together; throughput counts the tokens of one of its requests. The few bytes of the new positions' own KV are
    left out, and so is the arithmetic of attention, unless it is counted into the flops.

    Attributes:
        draft_weight_bytes, target_weight_bytes: read once a pass, in bytes.
        draft_kv_bytes, target_kv_bytes: KV cache per token of context, in bytes.
        draft_flops, target_flops: arithmetic per position, in floating-point operations (about 2 per parameter).
        memory_bandwidth: bytes per second.
        peak_flops: floating-point operations per second.
        batch_size, context_length: requests per pass, and tokens of context that each of them has.
        draft_overhead, target_overhead: seconds that a pass takes on top (kernel launches, sampling).

    Example:
        >>> cost = Roofline(2e9, 0, 2e9, 14e9, 0, 14e9, memory_bandwidth=2e12, peak_flops=2e14)
        >>> cost.draft_time, cost.verify_times(200)[[0, 99, 199]].tolist()
        (0.001, [0.007, 0.007, 0.014])
    """

    draft_weight_bytes: Annotated[float, Key("number", "bytes", SHORTEST, LONGEST, "read once a draft step")]
    draft_kv_bytes: Annotated[float, Key("number", "bytes", 0, LONGEST, "the draft's cache per token of context")]
    draft_flops: Annotated[float, Key("number", "flop", SHORTEST, LONGEST, "the draft's arithmetic per position")]
    target_weight_bytes: Annotated[float, Key("number", "bytes", SHORTEST, LONGEST, "read once a target call")]
    target_kv_bytes: Annotated[float, Key("number", "bytes", 0, LONGEST, "the target's cache per token of context")]
    target_flops: Annotated[float, Key("number", "flop", SHORTEST, LONGEST, "the target's arithmetic per position")]
    memory_bandwidth: Annotated[float, Key("number", "bytes/s", SHORTEST, LONGEST, "of the device")]
    peak_flops: Annotated[float, Key("number", "flop/s", SHORTEST, LONGEST, "of the device")]
    batch_size: Annotated[int, Key("whole number", "", 1, MAX_COUNT, "requests per pass")] = 1
    context_length: Annotated[int, Key("whole number", "tokens", 0, MAX_COUNT, "that each request has")] = 0
    draft_overhead: Annotated[float, Key("number", "s", 0, LONGEST, "a draft step takes on top")] = 0.0
    target_overhead: Annotated[float, Key("number", "s", 0, LONGEST, "a target call takes on top")] = 0.0
    kind = "roofline"

    def __post_init__(self) -> None:
        for name in ("draft_kv_bytes", "target_kv_bytes", "draft_overhead", "target_overhead"):
            object.__setattr__(self, name, _time(f"cost.{name}", getattr(self, name), zero=True))
        for name in ("draft_weight_bytes", "draft_flops", "target_weight_bytes", "target_flops", "memory_bandwidth",
                     "peak_flops"):  # fmt: skip
            object.__setattr__(self, name, _time(f"cost.{name}", getattr(self, name)))
        object.__setattr__(self, "batch_size", _whole("cost.batch_size", self.batch_size, 1))
        object.__setattr__(self, "context_length", _whole("cost.context_length", self.context_length, 0))
        for name, value in (("draft step", self.draft_time), ("target pass", float(self.verify_times(0)[0]))):
            if not SHORTEST <= value <= LONGEST:
                raise ValueError(
                    f"cost: the time of a {name} must be a number in {SHORTEST:g}..{LONGEST:g}, it comes to {value!r}"
                )

    @property
    def draft_time(self) -> float:  # type: ignore[override]
        """Seconds of one draft step."""
        return float(self._pass("draft", np.ones(1))[0])

    def verify_times(self, max_candidates: int) -> np.ndarray:
        return self._pass("target", np.arange(max_candidates + 1) + 1.0)

    def _pass(self, model: str, positions: np.ndarray) -> np.ndarray:
        weights, cache, flops, overhead = (
            getattr(self, f"{model}_{name}") for name in ("weight_bytes", "kv_bytes", "flops", "overhead")
        )
        with np.errstate(over="ignore", under="ignore"):
            moving = np.float64(weights + self.batch_size * self.context_length * cache) / self.memory_bandwidth
            return overhead + np.maximum(moving, self.batch_size * positions * flops / self.peak_flops)


@dataclass(frozen=True)
class Overlapped(Affine):
    r"""Draft and target on two devices: while one round is verified, the next one is drafted.

    With $U(k) = $ `verify_time` + `verify_slope` $\cdot\, k$, the time of the target call alone, a round takes

    $$T(k) = k\,t_d + U(k) - \text{overlap} \cdot \min\{k\,t_d,\, U(k)\},$$

    $\max\{k\,t_d, U(k)\}$ if `overlap` = 1 and the serial $k\,t_d + U(k)$ if it is 0. `overlap` is the share of the
    shorter activity that the longer one hides, averaged over rounds. $T$ is non-decreasing and convex.

    At 1 this is the ceiling of such a pipeline, not PEARL itself (arXiv 2408.11850): a step of PEARL with k candidates
    takes that time too, but what was drafted ahead of a rejection is void and there is no bonus token, so it emits
    $(1-\alpha^k)/((1-\alpha)(1+\alpha-\alpha^k))$ tokens a step under iid acceptance, fewer than a round here.

    Example:
        >>> Overlapped(draft_time=0.25, verify_time=1.0).round_times(6).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.25, 1.5]
    """

    overlap: Annotated[float, Key("number", "", 0, 1, "share of the shorter activity that the longer one hides")] = 1.0
    kind = "overlapped"

    def __post_init__(self) -> None:
        super().__post_init__()
        overlap = _time("cost.overlap", self.overlap, zero=True)
        if overlap > 1:
            raise ValueError(f"cost.overlap: must lie in [0, 1], got {overlap:g}")
        object.__setattr__(self, "overlap", overlap)

    def verify_times(self, max_candidates: int) -> np.ndarray:
        r"""The effective $V(k) = T(k) - k t_d \ge 0$: what drafting does not hide."""
        alone = super().verify_times(max_candidates)
        return alone - self.overlap * np.minimum(np.arange(max_candidates + 1) * self.draft_time, alone)
