"""Sweeps: the same bits wherever they are computed, and nothing lost when something is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from mdp.evaluate import evaluate
from mdp.problem import from_dict
from simulate import sweep as sweeps
from simulate.rounds import simulate
from simulate.sweep import Sweep, from_file, run

xarray = pytest.importorskip("xarray")

PROBLEM = {
    "acceptance": {"kind": "markov_modulated", "transition": [[0.9, 0.1], [0.3, 0.7]], "accept_prob": [0.95, 0.4],
                   "initial": [0.8, 0.2]},
    "cost": {"kind": "affine", "draft_time": 0.2, "verify_time": 1.0},
    "max_candidates": 4,
}  # fmt: skip
SMALL = Sweep(PROBLEM, {"cost.draft_time": [0.1, 0.4], "acceptance.accept_prob": [[0.9, 0.5], [0.8, 0.2], [0.6, 0.6]]},
              ("optimal", "fixed:2"), (3, 5), 500)  # fmt: skip


def test_cells_are_what_single_calls_give(tmp_path):
    found = run(SMALL, out=tmp_path / "a.nc", progress=False)
    assert dict(found.sizes) == {"draft_time": 2, "accept_prob": 3, "seed": 2, "policy": 2}
    problem = from_dict({**PROBLEM, "cost": {**PROBLEM["cost"], "draft_time": 0.4},
                         "acceptance": {**PROBLEM["acceptance"], "accept_prob": [0.8, 0.2]}})  # fmt: skip
    cell = found.sel(draft_time=0.4, accept_prob="[0.8, 0.2]", seed=5)
    single = simulate(problem, ["optimal", "fixed:2"], rounds=500, key=5)
    for name, result in zip(("optimal", "fixed:2"), single.to_dict()["policies"], strict=True):
        assert float(cell.throughput.sel(policy=name)) == result["throughput"]
    assert (found.lower <= found.upper).all()
    assert found.throughput.attrs["units"] == "tokens per unit of time"
    with xarray.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as saved:
        xarray.testing.assert_identical(saved.load(), found)
    assert not (tmp_path / "a.nc.parts").exists()


def test_exact_values():
    exact = replace(SMALL, rounds=None)
    found = run(exact, progress=False)
    assert "seed" not in found.sizes
    name, problem = exact.point(4)
    assert name == "cost.draft_time = 0.4, acceptance.accept_prob = [0.8, 0.2]"
    cell = found.isel(draft_time=1, accept_prob=1).sel(policy="fixed:2")
    assert float(cell.throughput) == evaluate(problem, "fixed:2").throughput
    optimal = found.throughput.sel(policy="optimal")
    assert (optimal <= found.upper * (1 + 1e-12)).all()
    assert (optimal >= found.lower * (1 - 1e-9)).all()


def test_a_stopped_run_is_resumed(tmp_path, monkeypatch):
    """Stopped behind the third batch: they are not computed again, and the result is the same."""
    calls, once = [], sweeps.batch

    def counted(sweep, points):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(list(points))
        return once(sweep, points)

    whole = run(SMALL, progress=False)
    monkeypatch.setattr(sweeps, "batch", counted)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, out=tmp_path / "a.nc", progress=False)
    assert not (tmp_path / "a.nc").exists()
    with pytest.raises(ValueError, match="holds an unfinished sweep"):
        run(SMALL, out=tmp_path / "a.nc", progress=False)
    with pytest.raises(ValueError, match="holds another sweep"):
        run(replace(SMALL, rounds=501), out=tmp_path / "a.nc", resume=True, progress=False)
    with pytest.raises(ValueError, match="holds another sweep"):  # other points under the same numbers
        run(replace(SMALL, grid=dict(reversed(SMALL.grid.items()))), out=tmp_path / "a.nc", resume=True, progress=False)
    monkeypatch.setattr(sweeps, "batch", lambda sweep, points: calls.append(list(points)) or once(sweep, points))
    resumed = run(SMALL, out=tmp_path / "a.nc", resume=True, progress=False)
    assert sorted(point for points in calls for point in points) == list(range(6))  # each exactly once
    xarray.testing.assert_identical(resumed, whole)


@pytest.mark.slow
def test_local_cluster_and_a_scheduler_give_the_same_bits_and_survive_a_killed_worker(tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    big = Sweep(PROBLEM, {"cost.draft_time": list(np.linspace(0.05, 0.5, 10)), "cost.verify_time": [0.5, 1.0, 2.0]},
                ("optimal", "fixed:2", "rejection:0.3"), tuple(range(4)), 2000)  # fmt: skip
    here = run(big, progress=False)
    xarray.testing.assert_identical(run(big, workers=2, progress=False), here)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).pid
        killer = subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(6); os.kill({victim}, {signal.SIGKILL})"]
        )
        found = run(big, scheduler=cluster.scheduler_address, progress=False)
        killer.wait()
        xarray.testing.assert_identical(found, here)


@pytest.mark.slow
def test_ten_thousand_cells_killed_and_resumed(tmp_path):
    """SIGKILL in the middle, then --resume: bit for bit what one process computes in one go."""
    spec = {"problem": PROBLEM, "grid": {"cost.draft_time": list(np.linspace(0.05, 0.5, 25)),
                                         "cost.verify_time": list(np.linspace(0.5, 2.0, 20))},
            "policies": ["optimal", "fixed:2", "rejection:0.3", "lookahead:0.4"], "seeds": [0, 1, 2, 3, 4],
            "rounds": 400}  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    sweep = from_file(tmp_path / "spec.json")
    assert sweep.num_cells == 10_000
    command = [sys.executable, "-m", "specstop", "sweep", "spec.json", "--out", "a.nc"]
    first = subprocess.Popen(command, cwd=tmp_path, start_new_session=True)
    parts = tmp_path / "a.nc.parts"
    while len(list(parts.glob("[0-9]*.json"))) < 40:
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "a.nc").exists()
    done = subprocess.run([*command, "--resume", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cells"] == 10_000
    with xarray.open_dataset(tmp_path / "a.nc", engine="h5netcdf") as saved:
        xarray.testing.assert_identical(saved.load(), run(sweep, progress=False))


def test_enclosed_values_say_between_what():
    beta = {"acceptance": {"kind": "beta_mixture", "mean": 0.8, "concentration": 4.0}, "cost": PROBLEM["cost"],
            "max_candidates": 4}  # fmt: skip
    found = run(Sweep(beta, {"cost.draft_time": [0.1, 0.3]}, ("fixed:2", "rejection:0.3")), progress=False)
    width = found.throughput_upper - found.throughput_lower
    assert (width.sel(policy="fixed:2") == 0).all() and (width.sel(policy="rejection:0.3") > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"cost.draft_time": []}}, "grid: must be an object of lists"),
        ({"grid": {"cost.draft_time": [0.1, -1.0]}}, r"at cost.draft_time = -1.0: cost.draft_time: must be"),
        ({"grid": {"cost.kind.deep": [1]}}, "leads nowhere"),
        ({"policies": ["fixed:2", "fixed:2"]}, "given twice"),
        ({"policies": ["nonsense"]}, "unknown rule"),
        ({"seeds": [0, 0], "rounds": 10}, "seeds: must be different"),
        ({"seeds": [0, 1]}, "seeds: are for rounds"),
        ({"grid": {"cost.draft_time": [0.1, 0.1]}}, "grid.cost.draft_time: a value is given twice"),
        ({"rounds": 0}, "rounds: must be a whole number"),
        ({"surplus": 1}, "surplus: unknown key"),
        ({"problem": []}, "problem: must be an object"),
        ({"policies": ["fixed:9"]}, r"length must be in 0..4 here"),
        ({"policies": ["svip"], "rounds": 10}, r"at cost.draft_time = 0.1: policy 'svip' needs entropy"),
        ({"policies": ["selftuned"]}, r"at cost.draft_time = 0.1: policy 'selftuned'"),
    ],
)
def test_refusals(tmp_path, change, message):
    spec = {"problem": PROBLEM, "grid": {"cost.draft_time": [0.1]}, "policies": ["fixed:2"], **change}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=message) as caught:
        run(from_file(tmp_path / "spec.json"), progress=False)
    assert "\n" not in str(caught.value)


def test_a_damaged_batch_is_named(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "_dataset", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(SMALL, out=tmp_path / "a.nc", progress=False)
    (tmp_path / "a.nc.parts" / "00001.json").write_text("{")
    with pytest.raises(ValueError, match=r"00001\.json is damaged"):
        run(SMALL, out=tmp_path / "a.nc", resume=True, progress=False)


def test_files_in_the_way(tmp_path):
    (tmp_path / "a.nc").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        run(SMALL, out=tmp_path / "a.nc", progress=False)
    with pytest.raises(ValueError, match="is no folder"):
        run(SMALL, out=tmp_path / "no" / "a.nc", progress=False)
