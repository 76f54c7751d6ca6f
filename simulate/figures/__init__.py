r"""Figures: a result goes in, a matplotlib `Figure` comes out, nothing is computed on the way.

Two kinds of results are drawn. A *comparison* of policies, or a solution (`comparisons`: `lengths`, `policies`,
`rates`, `thresholds`). And the *data* of a paper's figure, as `specstop figures` stores it (`draw`): a name and
series of columns, each with the origin of its numbers, so that a figure can be drawn again in another style without
computing anything again.

Every figure says where its numbers come from (published, derived, predicted, simulated, replayed or measured; which
times, declared or measured). Whiskers are intervals at the level written under the figure.

`Figure` is used directly, without pyplot: no global state, no window, safe in threads and in a server.
"""

from simulate.figures.comparisons import ORACLE, SIGNALS, lengths, policies, rates, thresholds
from simulate.figures.paper import draw
from simulate.figures.style import STYLE, render, save

__all__ = ["ORACLE", "SIGNALS", "STYLE", "draw", "lengths", "policies", "rates", "render", "save", "thresholds"]
