"""The stopping MDP of speculative decoding: processes, times, exact solution, stopping rules, traces.

Nothing here imports torch, and only the solvers import jax. Import the module you need, for example
`from mdp.problem import StoppingProblem`; this package deliberately re-exports nothing. It loads the published rules,
so that `mdp.policy.parse` knows every one of them, however it is reached.
"""

import mdp.rules as _rules  # noqa: F401
