"""`specstop figures`: every figure has data, origins and a caption; what is stored is drawn again without computing.

Golden numbers are digests of each series' columns (`SPECSTOP_GOLDEN=write` with the slow test writes them anew).
Wall times are in none of them.
"""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from simulate import figures as drawn
from simulate.figures.paper import DRAWINGS
from specstop.cli import main
from specstop.figures import heads, make, recipe, store, times
from specstop.figures.recipe import ORIGINS, Recipe, Unavailable
from specstop.paper import TOKENS_PER_SECOND

GOLDEN = Path(__file__).parent / "golden" / "figures.json"
CHEAP = ("phase",)
CLOSE = {"rtol": 1e-4, "atol": 1e-7}  # the pair's laws are float32
# The audit bins a signal at quantiles, and equal contexts give values equal but for rounding, which processors and
# batches change: a few candidates change bins, and so the control variate a little. The intervals are 7 % wide.
BINNED = {"rtol": 5e-3, "atol": 1e-7}


def run(*words):
    """Exit code, stdout and stderr of one command line."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(["figures", *map(str, words)])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def cheap(tmp_path_factory):
    """A folder with what needs no pair and little time, and what the verb said."""
    out = tmp_path_factory.mktemp("figures")
    code, said, _ = run("--out", out, "--quick", "--json", "--only", *CHEAP)
    assert code == 0
    return out, json.loads(said, parse_constant=pytest.fail)


def read(out, name):
    return json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)


def check_figure(out, name):
    """All files of a figure, and that its data says where each number is from."""
    data = read(out, name)
    assert data["name"] == name and len(data["caption"]) > 100 and data["series"]
    for entry in data["series"]:
        assert entry["origin"] in ORIGINS and entry["tag"] != "memory"
        assert (entry["tag"] and entry["source"]) or entry["origin"] not in ("published", "derived")
        assert (entry["tag"] == "derived") <= (entry["origin"] == "derived")
        assert len({len(column) for column in entry["columns"].values()}) == 1
    points = sum(len(next(iter(entry["columns"].values()))) for entry in data["series"])
    with (out / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == points and {row["origin"] for row in rows} == set(recipe.origins(data))
    for suffix, first in ((".pdf", b"%PDF"), (".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert (out / f"{name}{suffix}").read_bytes().startswith(first)
    for origin in recipe.origins(data):
        spoken = {"measured": ("measured", "live"), "derived": ("derived",)}.get(origin, (origin,))
        assert any(word in data["caption"].lower() for word in spoken), (name, origin)
    return data


def digest(data):
    """Length, first, last and mean of every numeric column of what depends neither on the clock nor on training."""
    found, number = {}, 0
    for entry in data["series"]:
        timed = entry["origin"] == "measured" or entry["panel"] in ("wall clock", "times")
        if timed or entry["name"].startswith("head "):
            continue
        before = len(found)
        for key, values in entry["columns"].items():
            numbers = [x for x in values if isinstance(x, (int, float)) and not isinstance(x, bool)]
            if numbers:
                name = f"{number} {entry['panel']} {entry['name']}: {key}"
                shown = [len(numbers), numbers[0], numbers[-1], float(np.mean(numbers))]
                found[name] = [float(f"{x:.7g}") for x in shown]
        number += len(found) > before
    return found


def check_golden(name, data):
    golden = json.loads(GOLDEN.read_text())[name]
    found = digest(data)
    assert list(found) == list(golden)
    for key, expected in golden.items():
        close = BINNED if name == "information" and " pair " in key else CLOSE
        np.testing.assert_allclose(found[key], expected, **close, err_msg=f"{name}: {key}")


def test_figures_are_whole_and_golden(cheap):
    out, said = cheap
    assert [row["name"] for row in said["figures"]] == list(CHEAP) and not said["not_made"] and said["trace"] is None
    for name in CHEAP:
        check_golden(name, check_figure(out, name))


def test_a_golden_number_that_moved_is_seen(cheap):
    data = read(cheap[0], "phase")
    data["series"][0]["columns"]["gain"][-1] *= 1.01
    with pytest.raises(AssertionError, match="phase"):
        check_golden("phase", data)


def test_pages_stand_alone(cheap):
    out, _ = cheap
    page, report = (out / "index.html").read_text(), (out / "report.md").read_text()
    assert not re.search(r"(src|href)=['\"]https?:", page) and "<script" not in page
    assert page.count("data:image/svg+xml;base64,") == len(CHEAP)
    assert "prefers-color-scheme: dark" in page and "name=viewport" in page
    for name in CHEAP:
        data = read(out, name)
        assert f"id={name}" in page and f"![{data['title']}]({name}.png)" in report and data["caption"] in report
    for link in re.findall(r"\]\(([^)]+)\)", report) + re.findall(r"href='([^#'][^']*)'", page):
        assert (out / link).is_file()
    assert "--quick" in report  # small numbers must not be taken for the full ones


def test_what_is_there_is_used_again_and_force_is_not(cheap):
    out, _ = cheap
    before = (out / "phase.png").read_bytes()
    _, said, _ = run("--out", out, "--quick", "--json", "--only", *CHEAP)
    assert all(row["reused"] for row in json.loads(said)["figures"])
    assert (out / "phase.png").read_bytes() == before
    data = read(out, "phase")
    (out / "phase.json").write_text(json.dumps(data | {"key": "of other settings", "title": "old"}))
    (out / "data" / "phase.json").write_text("{half")
    _, said, _ = run("--out", out, "--quick", "--json", "--only", "phase")
    assert not json.loads(said)["figures"][0]["reused"] and read(out, "phase") == data
    _, said, _ = run("--out", out, "--quick", "--json", "--force", "--only", "phase")
    assert not json.loads(said)["figures"][0]["reused"] and read(out, "phase") == data


def test_drawing_again_computes_nothing(cheap, tmp_path):
    out, _ = cheap
    code = (
        "import json, sys; from pathlib import Path; from simulate.figures import draw, save\n"
        f"save(draw(json.loads(Path({str(out / 'phase.json')!r}).read_text())), {str(tmp_path / 'again.png')!r})\n"
        "sys.exit(any(name in sys.modules for name in ('jax', 'torch', 'mdp.solve', 'matplotlib.pyplot')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (tmp_path / "again.png").read_bytes() == (out / "phase.png").read_bytes()
    with pytest.raises(ValueError, match="name: must be one of"):
        drawn.draw({"name": "nothing"})


def test_keys_follow_settings_code_and_inputs(tmp_path):
    one = recipe.Recipe("phase", "", ("phase",), make.RECIPES["phase"].compute, str)
    small, full = (store.Store(tmp_path, make.SOURCES, quick=quick) for quick in (True, False))
    assert small.key("phase") != full.key("phase") and small.key("phase") != small.key("information")
    assert small.key("phase") == store.Store(tmp_path, make.SOURCES, quick=True).key("phase")
    assert one.uses == ("phase",)
    for pattern in (*store.CODE, store.LIVE_CODE, store.RECIPE_CODE):
        assert list(store.ROOT.glob(pattern)), pattern


def test_what_cannot_be_made_is_said_and_leaves_nothing_old(tmp_path, monkeypatch):
    def never(_):
        raise Unavailable("it needs a pair that nobody has")

    missing = Recipe("gallery", "Counterexamples", (), never, str)
    monkeypatch.setattr(make, "RECIPES", {"gallery": missing})
    (tmp_path / "gallery.png").write_bytes(b"of an earlier run")
    result = make.make(tmp_path, quick=True)
    assert result["not_made"] == [
        {"name": "gallery", "title": "Counterexamples", "why": "it needs a pair that nobody has"}
    ]
    assert not (tmp_path / "gallery.png").exists()
    assert (
        "nobody has" in (tmp_path / "index.html").read_text() and "nobody has" in (tmp_path / "report.md").read_text()
    )


@pytest.mark.parametrize("words", [["--only", "nothing"], ["--trace", "nowhere"]])
def test_bad_input_is_one_line(words, tmp_path):
    code, out, err = run("--out", tmp_path / "figs", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and words[1] in err
    assert not (tmp_path / "figs").exists()


def test_no_origin_no_series():
    with pytest.raises(ValueError, match="origin"):
        recipe.series("x", "guessed", K=[1])
    with pytest.raises(ValueError, match="evidence tag"):
        recipe.series("x", "published", K=[1])
    with pytest.raises(ValueError, match="one length"):
        recipe.series("x", "predicted", K=[1], speedup=[1.0, 2.0])
    assert (recipe.published("README"), recipe.published("derived")) == ("published", "derived")
    with pytest.raises(ValueError, match="memory"):
        recipe.published("memory")
    assert TOKENS_PER_SECOND  # recalled: in no figure, which check_figure sees


def test_every_recipe_can_be_drawn():
    assert set(make.RECIPES) == set(DRAWINGS)
    assert all(set(entry.uses) - {"trace"} <= set(make.SOURCES) for entry in make.RECIPES.values())


def test_regression_and_reliability_find_what_made_them():
    rng = np.random.default_rng(0)
    calls = rng.integers(1, 60, (200, 2)).astype(float)
    noisy = calls @ [0.02, 0.1] + rng.normal(0, 0.01, 200)
    found, errors, r2 = times.regress(calls, noisy)
    assert (np.abs(found - [0.02, 0.1]) < 5 * errors).all() and 0.99 < r2 < 1
    truth = rng.random(20_000)
    honest, inflated = heads.reliability(truth, truth), heads.reliability(truth / (truth + 6 * (1 - truth)), truth)
    assert honest["ece"] < 1e-12 and honest["kl"] < 1e-12 and inflated["ece"] > 0.2 and inflated["kl"] > 0.2
    scores = truth > rng.random(20_000)
    assert heads.auroc(truth, scores) == pytest.approx(5 / 6, abs=0.01)  # P(U' > U) for densities 2u and 2(1 - u)


def grid():
    """What `train-head --grid` writes, with made-up numbers."""
    rows = [{"variant": variant, "depth": depth, "weight": weight, "kl": 0.3, "auroc": 0.7, "ece": 0.1,
             "throughput": 1.8, "throughput_se": 0.02, "best_threshold": 0.5}
            for variant in ("published", "matched") for depth in (0, 1, 3) for weight in (1.0, 6.0)]  # fmt: skip
    lines = [{**{key: rows[-1][key] for key in ("variant", "depth", "weight")}, "debiased": True, "count": 5,
              "predicted": x, "accepted": x} for x in (0.2, 0.8)]  # fmt: skip
    chosen = {key: rows[-1][key] for key in ("variant", "depth", "weight")}
    return {"rows": rows, "chosen": chosen, "reliability": lines, "constant_kl": 0.35,
            "best_fixed": {"policy": "fixed:4", "throughput": 1.7}}  # fmt: skip


class Known:
    """A store that holds what it is given."""

    quick = True

    def __init__(self, **results):
        self.results = results

    def get(self, name):
        return self.results[name]


def test_heads_are_read_from_the_grid():
    known = Known(heads=grid(), replayed={"pair": {"label": "a pair"}})
    data = {"name": "heads", "title": "Heads", **heads._heads(known)}
    levels = {entry["name"]: entry["columns"] for entry in data["series"] if entry["panel"] == "all"}
    assert levels == {"constant": {"kl": [0.35]}, "best fixed K": {"throughput": [1.7]}}
    figure = drawn.draw(data)
    titles = {axes.get_title("left").partition(":")[0] for axes in figure.axes}
    assert len(figure.axes) == 6 and titles == {"published", "matched"}
    (bins,) = heads._head_bins(known)
    assert bins["columns"]["predicted"] == [0.2, 0.8] and "matched" in bins["name"]


@pytest.mark.slow
def test_every_figure(tmp_path_factory):
    """All of `--quick`: files, origins, golden numbers, and nothing drawn outside its figure."""
    pytest.importorskip("torch")
    out = tmp_path_factory.mktemp("all")
    code, said, _ = run("--out", out, "--quick", "--json")
    result = json.loads(said, parse_constant=pytest.fail)
    made = [row["name"] for row in result["figures"]]
    assert code == 0 and not {row["name"] for row in result["not_made"]} - {"heads"}
    found = {name: check_figure(out, name) for name in made}
    if os.environ.get("SPECSTOP_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({name: digest(data) for name, data in found.items() if name != "heads"}, indent=0))
    for name, data in found.items():
        whole, (width, height) = drawn.draw(data).get_tightbbox(), drawn.draw(data).get_size_inches()
        assert min(whole.x0, whole.y0) > -0.02 and whole.x1 < width + 0.02 and whole.y1 < height + 0.02, name
        if name != "heads":  # trained, not golden
            check_golden(name, data)
    assert (out / "index.html").stat().st_size < 8_000_000
