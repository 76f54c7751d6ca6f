"""The gate's own checks, each seen to fail: torch may not go missing in CI, and the set-up has what it names."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SKIPPING = "import pytest\n\ndef test_models():\n    pytest.importorskip('a_package_that_is_missing')\n"


def run_a_skipping_test(tmp_path, **env):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_skipping.py").write_text(SKIPPING)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=tmp_path, env=path | env, capture_output=True, text=True, check=False)


def test_a_skip_is_a_failure_where_torch_is_required(tmp_path):
    assert run_a_skipping_test(tmp_path).returncode == 0
    answer = run_a_skipping_test(tmp_path, SPECSTOP_REQUIRE_TORCH="1")
    assert answer.returncode == 1 and "allows no skip" in answer.stdout


def test_a_missing_torch_stops_the_gate(monkeypatch):
    import conftest

    monkeypatch.setenv("SPECSTOP_REQUIRE_TORCH", "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(pytest.UsageError, match="torch cannot be imported"):
        conftest.pytest_configure(None)
    monkeypatch.delenv("SPECSTOP_REQUIRE_TORCH")
    conftest.pytest_configure(None)


def test_every_package_of_the_checkout_is_in_the_wheel():
    top = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    inner = {
        f"{path.parent.parent.name}.{path.parent.name}" for name in top for path in ROOT.glob(f"{name}/*/__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == top | inner


def test_makefile_and_gate_agree_with_the_project():
    makefile, gate = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    extras = PROJECT["project"]["optional-dependencies"]
    for extra in re.findall(r"-e '\.\[(\w+)\]'", makefile):
        assert extra in extras
    targets = set(re.findall(r"^([.\w/]+):", makefile, re.MULTILINE))
    assert {"demo", "test", "lint", "notebooks", "docs", "ci", "clean"} <= targets
    assert set(re.findall(r"\bmake ([.\w/]+)", gate)) <= targets
    assert "torch==" in (ROOT / "constraints.txt").read_text()


def test_no_tracked_text_names_this_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    home = str(Path.home())
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".ipynb", ".json", "") and path.is_file():
            text = path.read_text(errors="replace")
            assert len(ROOT.parts) < 3 or str(ROOT) not in text, name
            assert len(home) < 3 or f"{home}/" not in text, name
