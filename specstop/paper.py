"""Published figures of SpecDec++ (Huang, Guo, Wang, arXiv 2405.19715), each with its source, evidence tag and rounding.

Tags: `README` read in the official repository's README; `code` read there; `note` read in a third-party note that
quotes the paper; `memory` recalled from the paper, not checked; `derived` worked out from something published, here
digitised from a figure or implied by it. A tag says how far to trust a number and is never raised.

Not available as numbers, hence in no comparison: the fitted (t_draft, t_target), throughput per K and per h, the
acceptance heads' KL table, and the SpecDec++ points of the Pareto figure (fixed K's were digitised, those were not).
Llama-2-chat 7B drafts for 70B, temperature 1, top-k 50, at most 512 tokens; the oracle decodes greedily.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "DATASETS",
    "FIXED_LENGTHS",
    "MISSING",
    "ORACLE",
    "RULE",
    "TOKENS_PER_SECOND",
    "Dataset",
    "Figure",
    "PublishedOracle",
    "Rule",
]


@dataclass(frozen=True)
class Figure:
    """One published number; `rounding` is half a unit of its last digit, or the error of digitising."""

    value: float
    rounding: float
    tag: str
    source: str


@dataclass(frozen=True)
class Dataset:
    """Rates of fixed lengths by K (one error for all points of one plot), and the speedups in the headlines."""

    name: str
    verification_rate: Mapping[int, float]
    discard_rate: Mapping[int, float]
    rate_error: tuple[float, float]
    rate_tag: str
    rate_source: str
    best_fixed: Figure
    specdec: Figure
    gain: Figure


@dataclass(frozen=True)
class Rule:
    """The released rule: stop iff 1 - prod of head outputs > h, its bounds, and the grids that were searched."""

    threshold: float
    weight: float
    lag: int
    bounds: tuple[int, int]
    thresholds: tuple[float, ...]
    weights: tuple[float, ...]
    share_of_best: Figure
    tag: str
    source: str


@dataclass(frozen=True)
class PublishedOracle:
    """Candidate length = what will be accepted, greedy decoding on Alpaca."""

    verification_rate: Figure
    discard_rate: float
    speedup: Figure


PARETO = "Pareto figure, fixed-K points, digitised; the K labels are assumed"
HEADLINE = "README of Kaffaljidhmah2/SpecDec_pp, headline"
BASELINE = "best fixed-K speedup; agrees with headline / (1 + gain)"
FIXED_LENGTHS = (2, 4, 6, 8, 10, 12, 14)
"""Baseline lengths that were searched [note/README]; K = 2 lies off the plot."""


def _points(*values: float) -> dict[int, float]:
    return dict(zip(FIXED_LENGTHS[1:], values, strict=True))


def _dataset(name: str, v: dict, d: dict, fixed: Figure, speedup: float, gain: float) -> Dataset:
    headline = Figure(speedup, 0.005, "README", HEADLINE)
    return Dataset(
        name, v, d, (0.0005, 0.005), "derived", PARETO, fixed, headline, Figure(gain, 0.0005, "README", HEADLINE)
    )


DATASETS = {
    "Alpaca": _dataset(
        "Alpaca",
        _points(0.2851, 0.2408, 0.2154, 0.2019, 0.1943, 0.1875),
        _points(0.389, 0.633, 0.863, 1.126, 1.363, 1.592),
        Figure(1.90, 0.005, "note", "quoted beside the oracle"),
        2.04,
        0.072,
    ),
    "HumanEval": _dataset(
        "HumanEval",
        _points(0.2655, 0.2168, 0.1909, 0.1747, 0.1652, 0.1571),
        _points(0.317, 0.502, 0.699, 0.898, 1.118, 1.320),
        Figure(2.00, 0.005, "derived", BASELINE),
        2.23,
        0.111,
    ),
    "GSM8K": _dataset(
        "GSM8K",
        _points(0.2609, 0.2104, 0.1832, 0.1677, 0.1581, 0.1494),
        _points(0.287, 0.451, 0.620, 0.804, 0.999, 1.173),
        Figure(2.07, 0.005, "derived", BASELINE),
        2.26,
        0.094,
    ),
}

ORACLE = PublishedOracle(
    verification_rate=Figure(0.164, 0.0005, "note", "oracle on Alpaca"),
    discard_rate=0.0,
    speedup=Figure(2.92, 0.005, "note", "oracle on Alpaca"),
)

RULE = Rule(
    threshold=0.7,
    weight=6.0,
    lag=1,
    bounds=(2, 20),
    thresholds=(0.1, 0.3, 0.5, 0.7, 0.9),
    weights=(1.0, 3.0, 6.0, 12.0),
    share_of_best=Figure(
        0.993, 0.0005, "note/README", "one shared setting (w = 6, D = 3, h = .7) reaches at least this share"
    ),
    tag="note/README",
    source="the one setting shared by all datasets; lag and bounds: hf_generation.py [code]",
)

TOKENS_PER_SECOND = {
    "plain": {"Alpaca": 9.26, "HumanEval": 9.26, "GSM8K": 9.26},
    "best fixed K": {"Alpaca": 17.6, "HumanEval": 18.55, "GSM8K": 19.14},
    "SpecDec++": {"Alpaca": 18.88, "HumanEval": 20.61, "GSM8K": 20.95},
}
"""Heights of bars [memory]; their ratios match the headlines, and nothing is fitted to them."""

MISSING = (
    "fitted (t_draft, t_target)",
    "throughput per K and per threshold",
    "SpecDec++ points of the Pareto figure",
    "KL of the acceptance heads",
)
