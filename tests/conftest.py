"""What every test runs under: hypothesis profiles, no global float64, torch that may not go missing in CI."""

import importlib.util
import json
import os
import sys

import pytest
from hypothesis import HealthCheck, settings

SLOW_FIRST_CALL = [HealthCheck.too_slow]  # the first example of a test may compile

settings.register_profile("dev", max_examples=20, deadline=None, suppress_health_check=SLOW_FIRST_CALL)
settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, print_blob=True, suppress_health_check=SLOW_FIRST_CALL
)
settings.register_profile("explore", max_examples=2000, deadline=None, suppress_health_check=SLOW_FIRST_CALL)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run where torch tests would be skipped but must not be."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if os.environ.get("SPECSTOP_REQUIRE_TORCH") and missing:
        raise pytest.UsageError(f"SPECSTOP_REQUIRE_TORCH is set and {', '.join(missing)} cannot be imported")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Turn a skip for want of torch into a failure where torch is required."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("SPECSTOP_REQUIRE_TORCH") and "could not import" in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"skipped where SPECSTOP_REQUIRE_TORCH allows no skip: {report.longrepr}"


@pytest.fixture(scope="session", autouse=True)
def _own_compilation_cache(tmp_path_factory: pytest.TempPathFactory):
    """Commands under test keep their compiled programs here, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("jax")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """Compiled programs of one test module are of no use to the next and add up."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture
def run(capsys):
    """Run one command line in this process: exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        from specstop.cli import main

        code = main([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def lines(capsys):
    """Run one command line and return its JSON lines; anything else than the expected exit code fails."""

    def lines(*argv, code=0):
        from specstop.cli import main

        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == code
        out, err = capsys.readouterr()
        assert err == "" and out.endswith("\n")
        return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]

    return lines


@pytest.fixture
def text(capsys):
    """Run one command line and return what it prints for people."""

    def text(*argv, code=0):
        from specstop.cli import main

        capsys.readouterr()
        assert main([*map(str, argv)]) == code
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return text


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A trace of the tiny pair, recorded by the command."""
    pytest.importorskip("torch")
    from specstop.cli import main

    folder = tmp_path_factory.mktemp("recorded")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"tokens": [1 + r % 7, 2, 3 + r % 5]}) + "\n" for r in range(12)))
    pair, sizes = "--target tiny --draft tiny:1", "--max-new-tokens 24 --max-candidates 6 --seed 5"
    assert main(f"record {pair} --prompts {prompts} --out {folder}/trace {sizes}".split()) == 0
    return folder / "trace"


@pytest.fixture(scope="module")
def recorded_folder(tmp_path_factory):
    """A folder as `make demo` leaves it, with a tiny pair's trace in the place of the real one."""
    pytest.importorskip("torch")
    from realmodels.pair import load_pair
    from realmodels.record import record

    folder = tmp_path_factory.mktemp("recorded")
    prompts = [[1 + r % 7, 2, 3 + r % 5] for r in range(16)]
    record(load_pair("tiny", "tiny:1"), prompts, folder / "out" / "trace", max_new_tokens=24, progress=False)
    return folder
