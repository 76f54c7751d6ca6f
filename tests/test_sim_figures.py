"""Figures: what is drawn is what the result holds, origins are written, nothing is clipped, no global state moves."""

import subprocess
import sys
from dataclasses import replace

import chains
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from mdp.acceptance import IID
from mdp.cost import Affine
from mdp.evaluate import evaluate
from mdp.metrics import Tally
from mdp.policy import SIGNALS
from mdp.problem import StoppingProblem
from simulate import figures
from simulate.estimate import Comparison, PolicyResult, interval
from simulate.replay import replay

COST = Affine(draft_time=0.2, verify_time=1.0)
NAMES = ["fixed:2", "fixed:0", "fixed:1", "fixed:3", "rejection:0.40", "lookahead:0.5", "oracle"]


def result(policy, seed, clusters=8, signal=None):
    """Some clusters that balance: drafted + calls = emitted + discarded."""
    rng = np.random.default_rng(seed)
    calls, drafted = rng.integers(20, 40, clusters), rng.integers(40, 80, clusters)
    discarded = drafted // 3
    emitted = drafted + calls - discarded
    return PolicyResult(
        policy, Tally(calls, drafted, emitted, discarded, 0 * calls, calls + 0.2 * drafted), 1.0, signal
    )


@pytest.fixture(scope="module")
def simulated():
    return Comparison(tuple(result(name, seed) for seed, name in enumerate(NAMES)), rounds=240)


@pytest.fixture(scope="module")
def replayed():
    trace = chains.record(chains.random_pair(3), seed=1, num_requests=12, limit=24, depth=4)
    signals = ("entropy", "draft_prob", "token_accept_prob")
    rules = [f"{rule},signal={signal}" for signal in signals for rule in ("rejection:0.40", "lookahead:0.5")]
    return replay(trace, ["fixed:2", "fixed:0", "fixed:1", "fixed:3", "fixed:4", *rules, "oracle"], cost=COST)


def all_figures(simulated, replayed):
    problem = StoppingProblem(IID(0.7), COST, max_candidates=4)
    exact = [evaluate(problem, f"fixed:{k}") for k in range(4)]
    table = [[0.5, None, 0.3], [0.6, 0.9, np.inf]]
    return [
        figures.lengths(simulated, exact=exact, bounds=(2.0, 2.001)),
        figures.lengths(replayed, note="A note."),
        figures.thresholds(table, names=["easy", "turn", "hard"], note="Solved exactly."),
        figures.policies(simulated),
        figures.policies(replayed),
        figures.rates(replayed),
    ]


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible()]


def test_every_figure_is_whole_and_signed(simulated, replayed, tmp_path):
    for number, figure in enumerate(all_figures(simulated, replayed)):
        assert isinstance(figure, Figure)
        assert any(word in figure.get_supxlabel() for word in ("Simulated", "Replayed", "Solved"))
        assert figure.axes[0].get_xlabel()
        whole = figure.get_tightbbox()  # inches, all that is drawn
        width, height = figure.get_size_inches()
        assert whole.x0 > -0.01 and whole.y0 > -0.01 and whole.x1 < width + 0.01 and whole.y1 < height + 0.01
        path = figures.save(figure, tmp_path / f"{number}.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 250_000


def test_the_origin_of_times_is_told(replayed):
    assert "declared times" in figures.policies(replayed).get_supxlabel()
    assert "measured times" in figures.policies(replace(replayed, cost_origin="measured")).get_supxlabel()
    assert "12 requests" not in figures.rates(replayed).get_supxlabel()  # only the test half was scored
    assert "6 requests" in figures.rates(replayed).get_supxlabel()


def test_whiskers_are_the_intervals(simulated):
    figure = figures.lengths(simulated)
    drawn = figure.axes[0].containers
    by_length = sorted(
        (entry for entry in simulated.policies if entry.policy.startswith("fixed")), key=lambda x: x.policy
    )
    assert len(drawn) == len(by_length) == 4
    for k, (bars, entry) in enumerate(zip(drawn, by_length, strict=True)):
        x, y = bars.lines[0].get_xydata()[0]
        (segment,) = bars.lines[2][0].get_segments()
        assert (x, y) == (k, entry.speedup.value)
        np.testing.assert_allclose(segment[:, 1], interval(entry.speedup, entry.num_clusters))


def test_differences_are_paired_and_in_speedup(simulated):
    scaled = replace(simulated, policies=tuple(replace(entry, plain_time=3.0) for entry in simulated.policies))
    figure = figures.policies(scaled)
    drawn = {float(bars.lines[0].get_xdata()[0]) for bars in figure.axes[1].containers}
    expected = {3.0 * entry.throughput_difference.value for entry in scaled.differences if entry.policy != "oracle"}
    assert drawn == expected


def test_the_perfect_head_is_a_ceiling_and_the_oracle_has_no_difference(replayed):
    left, right = figures.policies(replayed).axes
    ceiling = max(entry.speedup.value for entry in replayed.policies if entry.signal == SIGNALS[0])
    assert any(np.allclose(line.get_xdata(), ceiling) and line.get_linestyle() == ":" for line in left.lines)
    assert len(right.containers) == len(replayed.policies) - 2  # neither the baseline nor the oracle


def test_the_oracle_is_a_bracket_only_where_it_is(replayed):
    assert any("bracket" in text for text in texts(figures.policies(replayed)))
    rising = replace(replayed, verify_time=(1.0, 1.1, 1.2, 1.3, 1.4))
    dear = replace(replayed, draft_time=1.0)
    for comparison in (rising, dear):
        assert not any("bracket" in text for text in texts(figures.policies(comparison)))


def test_never_is_hollow_and_named():
    axes = figures.thresholds([[0.5, None], [0.6, None]]).axes[0]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert len(hollow) == 1 and list(hollow[0].get_xdata()) == [0, 1]
    assert "stop" in [label.get_text() for label in axes.get_yticklabels()]


def test_one_cluster_has_no_whiskers():
    single = Comparison((result("fixed:1", 0, clusters=1), result("rejection:0.4", 1, clusters=1)), rounds=30)
    figure = figures.lengths(single)
    assert all(bars.has_yerr is False for bars in figure.axes[0].containers)
    figures.policies(single)


def test_rules_of_ones_own_have_a_place(simulated):
    own = replace(simulated, policies=(*simulated.policies, result("Mine(floor=0.2)", 9)))
    assert "Mine(floor=0.2)" in texts(figures.policies(own))
    figures.rates(own)


def test_each_signal_can_be_told_in_grey():
    looks = [*figures.SIGNALS.values(), figures.ORACLE]
    assert len({marker for _, marker, _ in looks}) == len({colour for colour, _, _ in looks}) == len(looks)
    assert set(SIGNALS) < set(figures.SIGNALS)


def test_no_global_state(simulated, tmp_path):
    before = dict(matplotlib.rcParams)
    first, second = (figures.save(figures.lengths(simulated), tmp_path / name) for name in ("a.png", "b.png"))
    assert dict(matplotlib.rcParams) == before
    assert first.read_bytes() == second.read_bytes()
    code = "import sys, simulate.figures; sys.exit('matplotlib.pyplot' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
