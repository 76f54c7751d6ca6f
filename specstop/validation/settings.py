"""What a validation records, and how it predicts; smaller for the tiny pair and for a quick look."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROFILES", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What is recorded, and how predictions are made.

    Attributes:
        groups: of training requests, for the jackknife.
        loading: how the models are loaded, as arguments of `realmodels.pair.load_pair`.
        rounds: simulated for each policy to see what the ends of texts are worth; 0 leaves that out.
    """

    target: str = "bundled"
    draft: str = "rtn:bits=4,group=64"
    prompts: str = "human-eval"
    template: str = "chat"
    num_prompts: int = 56
    max_new_tokens: int = 64
    max_candidates: int = 12
    temperature: float = 1.0
    top_k: int = 50
    seed: int = 0
    batch_size: int = 16
    groups: int = 20
    rounds: int = 200_000
    timing_repeats: int = 5
    level: float = 0.95
    loading: dict[str, Any] = field(default_factory=dict)

    @property
    def sampling(self) -> dict[str, Any]:
        names = ("max_candidates", "max_new_tokens", "temperature", "top_k", "seed")
        return {name: getattr(self, name) for name in names}


TINY: dict[str, Any] = {"prompts": "drawn", "max_new_tokens": 32, "max_candidates": 6, "batch_size": 250,
                        "timing_repeats": 11}  # fmt: skip
PROFILES: dict[tuple[bool, bool], dict[str, Any]] = {
    (False, False): {},
    (False, True): {"num_prompts": 8, "max_new_tokens": 24, "groups": 4, "rounds": 20_000, "timing_repeats": 2},
    (True, False): TINY | {"num_prompts": 6000},
    (True, True): TINY | {"num_prompts": 160, "groups": 8, "rounds": 20_000},
}
"""Settings that differ from the defaults, for (tiny pair, quick)."""
