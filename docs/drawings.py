"""The site's own figures, drawn when it is built, from results computed then."""

from pathlib import Path

__all__ = ["PROBLEM", "draw"]

PROBLEM = {
    "acceptance": {"kind": "markov_modulated", "transition": [[0.9, 0.1], [0.3, 0.7]], "accept_prob": [0.95, 0.4],
                   "initial": [0.8, 0.2]},
    "coupling": {"kind": "renewal"},
    "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0},
    "max_candidates": 12,
}  # fmt: skip
"""The tutorial's problem."""


def draw(folder: Path) -> None:
    """Write the figures that the pages show."""
    from mdp.evaluate import evaluate
    from mdp.problem import from_dict
    from mdp.solve import solve
    from simulate import figures
    from simulate.rounds import simulate

    problem = from_dict(PROBLEM)
    solution = solve(problem)
    policies = [*(f"fixed:{k}" for k in range(problem.max_candidates + 1)), "rejection:0.4", "lookahead:0.48"]
    exact = [evaluate(problem, policy, solution=solution) for policy in [*policies, "optimal"]]
    result = simulate(problem, [*policies, "optimal"], rounds=50_000, key=0)
    folder.mkdir(exist_ok=True)
    speedups = (
        solution.bounds[0] * problem.cost.verify_times(0)[0],
        solution.bounds[1] * problem.cost.verify_times(0)[0],
    )
    figures.save(
        figures.lengths(
            result, exact=exact, bounds=speedups, title="Easy and hard stretches of text: what each rule earns"
        ),
        folder / "lengths.svg",
    )
    figures.save(
        figures.thresholds(solution.to_dict()["survival_threshold"], names=("easy text", "hard text"),
                           title="The optimal policy", note="solved exactly"),
        folder / "thresholds.svg",
    )  # fmt: skip
