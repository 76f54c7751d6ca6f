"""Who imports whom: the contracts hold, they can fail, and what need not be loaded is not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mdp", "simulate", "realmodels", "specstop")
LINT = Path(sys.executable).with_name("lint-imports")

SOLVERS = (
    "mdp.case", "mdp.enclosed", "mdp.horizon", "mdp.information", "mdp.lattice", "mdp.many", "mdp.phase",
    "mdp.policy_iteration", "mdp.price", "mdp.relaxations", "mdp.search", "mdp.self_tuning", "mdp.solve",
    "mdp.survival_pass", "mdp.tabular", "mdp.theory", "mdp.value_iteration",
)  # fmt: skip

VIOLATIONS = {
    "torch in mdp": ("mdp/metrics.py", "import torch", "torch and transformers stay out"),
    "transformers in simulate": ("simulate/replay.py", "from transformers import AutoConfig", "torch and transformers"),
    "mdp knows simulate": ("mdp/policy.py", "from simulate import estimate", "specstop > realmodels > simulate > mdp"),
    "simulate knows realmodels": ("simulate/estimate.py", "import realmodels.verify", "specstop > realmodels > sim"),
    "realmodels knows specstop": ("realmodels/tiny.py", "import specstop.output", "specstop > realmodels > simulate"),
    "realmodels solves": ("realmodels/decode.py", "from mdp.solve import solve", "live code loads a saved policy"),
    "plots in realmodels": ("realmodels/record.py", "import matplotlib.pyplot", "matplotlib only where"),
    "jax in a policy": ("mdp/policy.py", "import jax.numpy", "jax only in"),
    "jax in the oracle": ("mdp/reference.py", "import jax", "jax only in"),
    "a sibling in the oracle": ("mdp/reference.py", "from mdp.cost import Affine", "inside mdp"),
    "cost knows problem": ("mdp/cost.py", "import mdp.problem", "inside mdp"),
    "policy knows solve": ("mdp/policy.py", "def late():\n    import mdp.solve", "inside mdp"),
    "a module of no layer": ("mdp/utilities.py", "", "inside mdp"),
}


def lint(folder):
    """Exit code and text of the contract check on a checkout."""
    env = os.environ | {"PYTHONPATH": str(folder)}
    command = [LINT, "--no-logo", "--no-cache", "--config", folder / "pyproject.toml"]
    answer = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return answer.returncode, answer.stdout + answer.stderr


@pytest.fixture
def copy(tmp_path):
    """The packages and their contracts, to be spoilt."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copy):
    code, text = lint(copy)
    assert code == 0, text


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_planted_violation_is_caught(copy, file, line, contract):
    path = copy / file
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    code, text = lint(copy)
    assert code == 1, text
    broken = [out for out in text.splitlines() if " BROKEN" in out]
    assert any(out.startswith(contract) for out in broken), text


def modules_of(*packages):
    """All modules of our packages, by file name."""
    return [
        f"{package}.{path.stem}" for package in packages for path in sorted((ROOT / package).glob("[a-z]*.py"))
    ] + list(packages)


def loaded_by(modules, heavy):
    """Which of `heavy` a fresh process has loaded after importing `modules`."""
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += f"print(*({set(heavy)!r} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_mdp_and_simulate_load_no_torch():
    modules = modules_of("mdp", "simulate")
    assert {"mdp.solve", "simulate.replay", "mdp"} <= set(modules)
    assert loaded_by(modules, ["torch", "transformers", "accelerate", "gguf"]) == set()


def test_that_check_can_fail():
    pytest.importorskip("torch")
    assert loaded_by([*modules_of("mdp"), "realmodels.verify"], ["torch", "transformers"]) == {"torch"}


def test_policies_and_replay_load_no_jax_and_no_plots():
    light = [name for name in modules_of("mdp") if name not in SOLVERS]
    light += ["simulate.replay", "simulate.estimate"]
    assert loaded_by([*light, "specstop.verbs"], ["jax", "matplotlib", "torch", "pandas"]) == set()
    assert "jax" in loaded_by(["mdp.solve"], ["jax"])
