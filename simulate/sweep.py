r"""Grids of problems x policies x seeds, as one labelled dataset.

A *sweep* is a problem file with some of its numbers replaced by lists (`grid`), the policies to compare, and either
seeds and rounds, or none: then every value is exact, or enclosed (`throughput_lower`, `throughput_upper`). Each point
of the grid is one problem; it is solved, for the bounds and for `optimal`, and all policies are played on it with each
seed, on the same coins.

    {"problem": {...}, "grid": {"cost.draft_time": [0.1, 0.2], "acceptance.accept_prob": [0.7, 0.8, 0.9]},
     "policies": ["optimal", "fixed:4"], "seeds": [0, 1], "rounds": 10000}

A point's result depends on nothing but the point, so it makes no difference where it is computed: in this process, in
others on this machine, or behind a Dask scheduler; to the last bit. Points are worked on in batches, and each batch is
a file of its own as soon as it is done. A run that is killed is resumed from those; a worker that dies costs its batch.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdp import entrants
from mdp.policy import PolicySpec
from mdp.problem import StoppingProblem, from_dict, parse_json, read_text
from mdp.trace import atomic_write
from simulate import cluster

if TYPE_CHECKING:
    import xarray

__all__ = ["Sweep", "from_file", "run"]

MAX_CELLS = 10_000_000
MOST_BATCHES = 256
RATES = ("throughput", "throughput_se", "speedup", "block_efficiency", "verification_rate", "discard_rate")
EXACT = (*(rate for rate in RATES if rate != "throughput_se"), "throughput_lower", "throughput_upper")
UNITS = {
    "throughput": "tokens per unit of time", "throughput_se": "tokens per unit of time", "speedup": "1",
    "throughput_lower": "tokens per unit of time", "throughput_upper": "tokens per unit of time",
    "block_efficiency": "tokens per target call", "verification_rate": "target calls per token",
    "discard_rate": "candidates per token", "lower": "tokens per unit of time", "upper": "tokens per unit of time",
    "solved": "1 if the bounds closed",
}  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """What is to be computed; fields as in the module docstring. `rounds` None: exact values, and no seeds.

    Raises:
        ValueError: naming the field, the value and what is allowed; for a point of the grid, the point.
    """

    problem: Mapping[str, Any]
    grid: Mapping[str, list]
    policies: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    rounds: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Mapping) or not all(
            isinstance(axis, list) and axis for axis in self.grid.values()
        ):
            raise ValueError('grid: must be an object of lists that are not empty, as {"cost.draft_time": [0.1, 0.2]}')
        for path, axis in self.grid.items():
            if len({json.dumps(value) for value in axis}) < len(axis):
                raise ValueError(f"grid.{path}: a value is given twice")
        if not isinstance(self.policies, (list, tuple)) or not all(isinstance(text, str) for text in self.policies):
            raise ValueError(f"policies: must be a list of policy strings, got {self.policies!r:.60}")
        whole = [isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63 for seed in self.seeds]
        if not whole or not all(whole) or len(set(self.seeds)) < len(whole):
            raise ValueError(f"seeds: must be different whole numbers in 0..2**63 - 1, got {self.seeds!r:.60}")
        if self.rounds is not None and (
            isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1
        ):
            raise ValueError(f"rounds: must be a whole number >= 1, or left out, got {self.rounds!r:.60}")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError("policies: one is given twice")
        entrants.read(self.policies)
        if self.num_cells > MAX_CELLS:
            raise ValueError(f"grid: at most {MAX_CELLS} cells, these are {self.num_cells}")
        object.__setattr__(self, "policies", tuple(self.policies))
        object.__setattr__(self, "seeds", tuple(self.seeds))

    @property
    def num_points(self) -> int:
        return math.prod(len(axis) for axis in self.grid.values())

    @property
    def num_cells(self) -> int:
        """Points x policies x seeds."""
        return self.num_points * len(self.policies) * (len(self.seeds) if self.rounds else 1)

    def point(self, index: int) -> tuple[str, StoppingProblem]:
        """Name and problem of a point, the last axis fastest."""
        shape = [len(axis) for axis in self.grid.values()]
        place = np.unravel_index(index, shape) if shape else ()
        chosen = {path: axis[int(at)] for (path, axis), at in zip(self.grid.items(), place, strict=True)}
        data: Any = deepcopy(dict(self.problem))
        name = ", ".join(f"{path} = {json.dumps(value)}" for path, value in chosen.items())
        for path, value in chosen.items():
            *parents, last = path.split(".")
            part = data
            for parent in parents:
                part = part.setdefault(parent, {}) if isinstance(part, dict) else None
            if not isinstance(part, dict):
                raise ValueError(f"grid: {path!r} leads nowhere in the problem")
            part[last] = value
        try:
            return name, from_dict(data)
        except ValueError as error:
            raise ValueError(f"at {name}: {error}" if name else str(error)) from None

    def axes(self) -> dict[str, str]:
        """Name of each axis in the dataset: the last part of its path where that is enough to tell them apart."""
        last = [path.split(".")[-1] for path in self.grid]
        taken = {"policy", "seed", *UNITS}
        return {path: short if last.count(short) == 1 and short not in taken else path.replace(".", "_")
                for path, short in zip(self.grid, last, strict=True)}  # fmt: skip


def from_file(path: str | Path) -> Sweep:
    """A sweep from its JSON file.

    Raises:
        ValueError: one line that names the file and what is wrong.
    """
    try:
        data = parse_json(read_text(path))
        if not isinstance(data, dict):
            raise ValueError(f"the sweep must be an object, got {data!r:.60}")
        known = ("problem", "grid", "policies", "seeds", "rounds")
        for key in data:
            if key not in known:
                raise ValueError(f"{key}: unknown key; allowed are {', '.join(known)}")
        for key in ("problem", "grid", "policies"):
            if key not in data:
                raise ValueError(f"{key}: missing")
        if not isinstance(data["problem"], dict) or not isinstance(data.get("seeds", []), list):
            raise ValueError("problem: must be an object, and seeds a list")
        if "seeds" in data and data.get("rounds") is None:
            raise ValueError("seeds: are for rounds, which are left out; exact values have none")
        return Sweep(**data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def run(
    sweep: Sweep,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int = 0,
    scheduler: str | None = None,
    progress: bool | None = None,
) -> "xarray.Dataset":
    """Compute a sweep.

    Args:
        out: netCDF file to write; batches that are done wait beside it in `OUT.parts` until all are.
        resume: go on with what a killed run left there.
        workers: processes of a local Dask cluster; 0: this process.
        scheduler: address of a Dask scheduler, whose workers have specstop installed.
        progress: whether to show a bar; None: if stderr is a terminal.

    Raises:
        ValueError: if a point is no problem, a policy has no value there, or files are in the way.
    """
    _check(sweep)
    size = max(1, -(-sweep.num_points // MOST_BATCHES))
    batches = [range(first, min(first + size, sweep.num_points)) for first in range(0, sweep.num_points, size)]
    parts = None if out is None else _parts(Path(out), sweep, resume)
    done = {} if parts is None else _finished(parts, batches)
    missing = [index for index in range(len(batches)) if index not in done]
    for index, result in _work(sweep, batches, missing, workers, scheduler, progress):
        done[index] = result
        if parts is not None:
            atomic_write(parts / f"{index:05d}.json", json.dumps(result).encode())
    dataset = _dataset(sweep, [done[index] for index in range(len(batches))])
    if out is not None and parts is not None:
        draft = parts / "whole.nc"
        dataset.to_netcdf(draft, engine="h5netcdf")
        draft.replace(out)
        shutil.rmtree(parts)
    return dataset


def _check(sweep: Sweep) -> None:
    """Every point and what each policy asks of it, before any is worked on."""
    from mdp.evaluate import check_exact, evaluate
    from simulate.rounds import check

    specs = entrants.read(sweep.policies)
    for index in range(sweep.num_points):
        name, problem = sweep.point(index)
        try:
            for spec in specs:
                if spec.policy is None:
                    continue
                entrants.fit_depth(spec.text, spec.policy, int(problem.max_candidates), problem.acceptance.num_regimes)
                if sweep.rounds is not None:
                    check(problem, spec)
                elif index:
                    check_exact(problem, spec)
                else:  # whether a rule has an exact value at all, the first point tells
                    evaluate(problem, spec)
        except ValueError as error:
            raise ValueError(f"at {name}: {error}" if name else str(error)) from None


def batch(sweep: Sweep, points: Iterable[int]) -> list[dict[str, Any]]:
    """Results of some points: per point the bounds, and per seed and policy its rates."""
    specs = entrants.read(sweep.policies)
    return [_point(sweep, specs, *sweep.point(index)) for index in points]


def _point(sweep: Sweep, entered: list[PolicySpec], name: str, problem: StoppingProblem) -> dict[str, Any]:
    from mdp.solve import solve

    solution = solve(problem)
    specs = [replace(spec, policy=spec.policy or solution.policy) for spec in entered]
    try:
        rows = [_exact(problem, specs)] if sweep.rounds is None else [
            _played(problem, specs, sweep.rounds, seed) for seed in sweep.seeds
        ]  # fmt: skip
    except ValueError as error:
        raise ValueError(f"at {name}: {error}" if name else str(error)) from None
    lower, upper = solution.bounds
    return {"lower": lower, "upper": upper, "solved": int(solution.status.name == "successful"), "rates": rows}


def _exact(problem: StoppingProblem, specs: list) -> list[list[float | None]]:
    from mdp.evaluate import evaluate

    found = [evaluate(problem, spec).to_dict() for spec in specs]
    for value in found:  # where a value is enclosed rather than exact these differ
        value["throughput_lower"], value["throughput_upper"] = value.get("throughput_bounds", [value["throughput"]] * 2)
    return [[value[rate] for rate in EXACT] for value in found]


def _played(problem: StoppingProblem, specs: list, rounds: int, seed: int) -> list[list[float | None]]:
    from simulate.rounds import simulate

    found = simulate(problem, specs, rounds=rounds, key=seed).to_dict()["policies"]
    return [
        [None if value[rate] is None or math.isnan(value[rate]) else value[rate] for rate in RATES] for value in found
    ]


def _work(
    sweep: Sweep, batches: list[range], missing: list[int], workers: int, scheduler: str | None, progress: bool | None
) -> Iterator[tuple[int, list]]:
    """Results of the missing batches, as they get done."""
    from tqdm.auto import tqdm

    bar = tqdm(total=len(batches), initial=len(batches) - len(missing), unit="batch",
               disable=None if progress is None else not progress)  # fmt: skip
    with bar:
        if not workers and scheduler is None:
            for index in missing:
                yield index, batch(sweep, batches[index])
                bar.update()
            return
        with cluster.client(workers, scheduler) as (client, as_completed):
            task = partial(batch, sweep)
            jobs = {client.submit(task, list(batches[index]), pure=False, retries=3): index for index in missing}
            for job in as_completed(jobs):
                yield jobs[job], job.result()
                bar.update()


def _parts(out: Path, sweep: Sweep, resume: bool) -> Path:
    """The folder of finished batches, new or left by a run of the same sweep."""
    parts = out.with_name(out.name + ".parts")
    if out.exists():
        raise ValueError(f"out: {out} is there already")
    if not out.parent.is_dir():
        raise ValueError(f"out: {out.parent} is no folder")
    same = json.dumps({"sweep": asdict(sweep), "versions": _versions()})  # in order: points are numbered by it
    if parts.exists():
        if not resume:
            raise ValueError(f"out: {parts} holds an unfinished sweep; resume it or remove the folder")
        if not (parts / "sweep.json").exists() or (parts / "sweep.json").read_text() != same:
            raise ValueError(f"out: {parts} holds another sweep, or one begun with other versions; remove the folder")
        return parts
    parts.mkdir()
    atomic_write(parts / "sweep.json", same.encode())
    return parts


def _finished(parts: Path, batches: list[range]) -> dict[int, list]:
    """Batches that an earlier run finished."""
    done = {}
    for path in parts.glob("[0-9]*.json"):
        index = int(path.stem)
        try:
            result = json.loads(path.read_text())
        except ValueError:
            raise ValueError(f"out: {path} is damaged; remove it") from None
        if index >= len(batches) or len(result) != len(batches[index]):
            raise ValueError(f"out: {path} does not belong to this sweep; remove it")
        done[index] = result
    return done


def _versions() -> dict[str, str]:
    """What a result depends on besides the sweep; `source` is a digest of the code itself."""
    digest = hashlib.blake2b(digest_size=8)
    for package in ("mdp", "simulate"):
        folder = Path(__file__).parents[1] / package
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return {name: version(name) for name in ("specstop", "numpy", "scipy", "jax")} | {"source": digest.hexdigest()}


def _dataset(sweep: Sweep, results: list[list[dict[str, Any]]]) -> "xarray.Dataset":
    import xarray

    points = [point for part in results for point in part]
    names, shape = sweep.axes(), tuple(len(axis) for axis in sweep.grid.values())
    seeds = list(sweep.seeds) if sweep.rounds else []
    dims = (*names.values(), *(["seed"] if seeds else []), "policy")
    rates = np.array([point["rates"] for point in points], dtype=np.float64)  # [points, seeds, policies, rates]
    shown = RATES if seeds else EXACT
    rates = rates.reshape(*shape, *([len(seeds)] if seeds else []), len(sweep.policies), len(shown))
    data: dict[str, Any] = {name: (dims, rates[..., i], {"units": UNITS[name]}) for i, name in enumerate(shown)}
    for name in ("lower", "upper", "solved"):
        values = np.array([point[name] for point in points]).reshape(shape)
        data[name] = (tuple(names.values()), values, {"units": UNITS[name]})
    coords: dict[str, Any] = {"policy": list(sweep.policies)} | ({"seed": seeds} if seeds else {})
    for path, axis in sweep.grid.items():
        plain = all(isinstance(value, (int, float)) for value in axis)
        coords[names[path]] = (names[path], axis if plain else [json.dumps(value) for value in axis], {"path": path})
    origin = "exact" if sweep.rounds is None else "simulated"
    attrs = {"sweep": json.dumps(asdict(sweep), sort_keys=True), "origin": origin, **_versions()}
    return xarray.Dataset(data, coords, attrs)
