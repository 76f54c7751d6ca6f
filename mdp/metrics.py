r"""What a run of speculative decoding is measured by: the only definitions of its counts and rates.

A round drafts $k$ candidates, submits them to one target call, keeps the accepted prefix of length $L$ and
adds one token of the target's own (correction or bonus). Summed over rounds,

$$\text{num\_drafted} + \text{num\_target\_calls}
  = \text{num\_emitted} + \text{num\_discarded} + \text{num\_cut},$$

exactly, in every run. The rejected candidate counts as discarded. `num_cut` are tokens dropped at the maximum
length, or the bonus after an accepted end-of-text; the endless model has none.

Rates are ratios of sums (long run), never means of per-request ratios. Source: SpecDec++ (arXiv 2405.19715,
section 3), which leaves cut tokens out; so does `discard_rate`, and `cut_rate` stands beside it.
"""

from dataclasses import dataclass
from typing import Any

__all__ = ["Tally", "TokenBalanceError"]


class TokenBalanceError(AssertionError):
    """Tokens were lost or invented: a bug in whatever produced the tally, never bad input."""


@dataclass(frozen=True)
class Tally:
    """Sums over rounds. Each field is a number, or an array with one entry per policy, request or replica.

    Expected values per round fit too: then `num_target_calls` is 1.
    """

    num_target_calls: Any
    num_drafted: Any
    num_emitted: Any
    num_discarded: Any
    num_cut: Any
    time: Any

    @property
    def throughput(self) -> Any:
        r"""$\rho$ = emitted tokens per unit time, a ratio of sums."""
        return self.num_emitted / self.time

    @property
    def block_efficiency(self) -> Any:
        """Emitted tokens per target call, in [1, K + 1] when nothing is cut."""
        return self.num_emitted / self.num_target_calls

    @property
    def verification_rate(self) -> Any:
        """Target calls per emitted token; 1 / block efficiency."""
        return self.num_target_calls / self.num_emitted

    @property
    def discard_rate(self) -> Any:
        """Discarded candidates (the rejected one included, cut tokens not) per emitted token."""
        return self.num_discarded / self.num_emitted

    @property
    def cut_rate(self) -> Any:
        """Cut tokens per emitted token."""
        return self.num_cut / self.num_emitted

    @property
    def mean_candidates(self) -> Any:
        """Drafted candidates per round."""
        return self.num_drafted / self.num_target_calls

    @property
    def accept_rate_drafted(self) -> Any:
        """Accepted candidates / drafted candidates: what serving stacks call the acceptance rate."""
        return (self.num_drafted - self.num_discarded) / self.num_drafted

    @property
    def imbalance(self) -> Any:
        """Left side minus right side of the token balance; 0 in every correct run."""
        return self.num_drafted + self.num_target_calls - self.num_emitted - self.num_discarded - self.num_cut

    def check_balance(self) -> "Tally":
        """Return self if whole-number counts balance exactly.

        Raises:
            TokenBalanceError: if they do not.
        """
        imbalance = self.imbalance
        if not bool(getattr(imbalance == 0, "all", lambda: imbalance == 0)()):
            raise TokenBalanceError(f"token balance is off by {imbalance}")
        return self
