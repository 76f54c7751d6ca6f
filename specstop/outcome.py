"""What a demo is made of and what it found: settings, and an outcome that is filled stage by stage."""

import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mdp.evaluate import Evaluation
from mdp.problem import StoppingProblem
from mdp.trace import Trace
from simulate.estimate import Comparison, TraceComparison
from specstop.output import jsonable

__all__ = ["COST_RATIO", "FULL", "QUICK", "REGIMES", "Live", "Outcome", "Settings", "versions"]

COST_RATIO = 0.22
"""Declared time of a draft step in target calls: that of SpecDec++'s pairs (arXiv 2405.19715)."""

REGIMES = ("easy text", "a turn: fine itself, trouble next", "trouble")
"""Names of the synthetic problem's regimes."""


@dataclass(frozen=True)
class Settings:
    """What is recorded and how long is simulated; everything else is the same in every demo."""

    target: str
    draft: str
    prompts: str
    num_prompts: int
    max_new_tokens: int
    rounds: int
    live_prompts: int
    live_tokens: int
    live_candidates: int = 4
    temperature: float = 1.0
    top_k: int = 50
    seed: int = 0
    batch_size: int = 16
    timing_repeats: int = 5


FULL = Settings("bundled", "rtn:bits=4,group=64", "human-eval", num_prompts=32, max_new_tokens=64, rounds=400_000,
                live_prompts=3, live_tokens=16)  # fmt: skip
QUICK = Settings("tiny", "tiny", "counted", num_prompts=32, max_new_tokens=32, rounds=20_000, live_prompts=4,
                 live_tokens=24, timing_repeats=11)  # fmt: skip


@dataclass(frozen=True)
class Live:
    """One policy run live and replayed, both greedy, round by round."""

    policy: str
    num_requests: int
    num_rounds: int
    num_equal: int

    @property
    def equal(self) -> bool:
        return self.num_equal == self.num_rounds


@dataclass
class Outcome:
    """Everything the report and the figures are made of; filled stage by stage."""

    settings: Settings
    problem: StoppingProblem
    solution: Any = None
    exact: list[Evaluation] = field(default_factory=list)
    simulated: Comparison | None = None
    trace: Trace | None = None
    reused: bool = False
    declared: TraceComparison | None = None
    measured: TraceComparison | None = None
    live: list[Live] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        assert self.simulated and self.trace and self.declared and self.measured
        manifest = self.trace.manifest
        models = manifest["models"]
        pair = {
            "target": models["target"]["name"], "draft": models["draft"]["name"], "prompts": self.settings.prompts,
            "num_requests": self.trace.num_requests, "num_positions": self.trace.num_positions,
            "mean_acceptance": manifest["mean_acceptance"], "sampling": manifest["sampling"],
            "draft_is_target_time": manifest["draft_is_target_time"], "reused": self.reused,
        }  # fmt: skip
        return jsonable({
            "synthetic": self.simulated.to_dict(),
            "replay": self.declared.to_dict(),
            "pair": pair,
            "cost": {"declared": {"kind": "affine", "draft_time": COST_RATIO, "verify_time": 1.0},
                     "measured": manifest["measured"]},
            "seconds": self.seconds,
            "versions": versions(),
            "problem": self.problem.to_dict(),
            "solution": self.solution.to_dict(),
            "predicted": [entry.to_dict() for entry in self.exact],
            "replay_measured": self.measured.to_dict(),
            "live": [vars(entry) | {"equal": entry.equal} for entry in self.live],
        })  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("specstop", "numpy", "scipy", "jax", "torch", "transformers", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
