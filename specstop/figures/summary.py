"""The table: published, predicted and measured on one page, each number with its interval and its evidence."""

from collections.abc import Iterator
from typing import Any

from mdp.policy import parse
from specstop.figures.pair import PAIR, live_speedups, predicted_systems, replayed_row, systems
from specstop.figures.recipe import Data, Recipe, pluck, published, series
from specstop.figures.store import Store
from specstop.outcome import COST_RATIO
from specstop.paper import DATASETS, ORACLE, Figure
from specstop.prediction import FIRST, SHARE

__all__ = ["COLUMNS", "RECIPES", "rows"]

COLUMNS = ("published", "predicted", "replayed", "live")
"""What stands side by side; `published` holds derived numbers too, marked as such."""

SHORT = {
    SHARE: "share of the best (w, h) at w = 6, h = .7",
    "optimum with the same head, no lag, no bias": "optimum, same head",
    "best threshold h of the grid": "best h of the grid",
    "best threshold h, any": "best h",
    "oracle verification rate 1 - mean": "oracle verification rate",
    "oracle speedup from the mean": "oracle speedup",
    "discard rate of K = 4": "discard rate at K = 4",
}
ORDER = (
    "best fixed-K speedup", "SpecDec++ speedup",
    "threshold on draft prob., speedup", "gain over best fixed K", "optimum, same head", "optimum of its chain",
    "perfect head", "oracle speedup", "oracle speedup at the published v", "oracle verification rate",
    "best h of the grid", "best h", "share of the best (w, h) at w = 6, h = .7", "discard rate at K = 4",
    "verification rate at K = 4", "mean acceptance", "cost ratio t_draft / t_target",
)  # fmt: skip
"""Quantities in the order of the page."""


def _cells(store: Store) -> Iterator[Data]:
    """One cell each: quantity, pair, column, value, interval, evidence."""
    prediction = store.get("prediction")
    for row in prediction["fitted"]:
        if row["quantity"].startswith("concentration"):
            continue
        pairs = [row["dataset"]] if row["quantity"] == "mean acceptance" else list(DATASETS)
        for name in pairs:
            yield _cell(row["quantity"], name, "predicted", "predicted", row["fitted"], row["interval"], fitted=True)
    fitted = (("best fixed-K speedup", DATASETS[FIRST].best_fixed), ("SpecDec++ speedup", DATASETS[FIRST].specdec))
    for quantity, figure in fitted:
        yield _read(quantity, FIRST, figure)
        yield _cell(quantity, FIRST, "predicted", "predicted", figure.value, None, fitted=True)
    yield _read("gain over best fixed K", FIRST, DATASETS[FIRST].gain)
    gain = DATASETS[FIRST].specdec.value / DATASETS[FIRST].best_fixed.value - 1.0
    yield _cell("gain over best fixed K", FIRST, "predicted", "predicted", gain, None, fitted=True)
    for row in prediction["predicted"]:
        quantity = SHORT.get(str(row["quantity"]), str(row["quantity"]))
        if row["published"] is not None:
            yield _cell(quantity, row["dataset"], "published", published(row["tag"]), row["published"], None,
                        tag=row["tag"], source=row["source"])  # fmt: skip
        yield _cell(quantity, row["dataset"], "predicted", "predicted", row["predicted"], row["interval"],
                    within=row["within"])  # fmt: skip
    for name, data in DATASETS.items():
        yield _cell("verification rate at K = 4", name, "published", published(data.rate_tag),
                    data.verification_rate[4], None, tag=data.rate_tag, source=data.rate_source)  # fmt: skip
        fixed = prediction["curves"][name]["fixed"]
        rate = fixed["verification_rate"][fixed["length"].index(4)]
        yield _cell("verification rate at K = 4", name, "predicted", "predicted", rate, None, fitted=True)
    yield from _pair_cells(store)


def _read(quantity: str, pair: str, figure: Figure) -> Data:
    return _cell(quantity, pair, "published", published(figure.tag), figure.value, None, tag=figure.tag,
                 source=figure.source)  # fmt: skip


def _pair_cells(store: Store) -> Iterator[Data]:
    replayed, modelled, live = (store.get(name) for name in ("replayed", "modelled", "live"))
    policies, named = replayed["policies"], systems(replayed["chosen"])
    yield _cell("mean acceptance", PAIR, "predicted", "predicted", modelled["mean"], None, fitted=True)
    yield _cell("cost ratio t_draft / t_target", PAIR, "predicted", "predicted", COST_RATIO, None, declared=True)
    labels = {
        "best fixed K": "best fixed-K speedup", "threshold, draft prob.": "threshold on draft prob., speedup",
        "optimum of its chain": "optimum of its chain", "perfect head": "perfect head", "oracle": "oracle speedup",
    }  # fmt: skip
    (predicted,) = predicted_systems(store, PAIR)
    (run,) = live_speedups(store, PAIR)
    for system, quantity in labels.items():
        row = replayed_row(policies[named[system]])
        yield _cell(quantity, PAIR, "replayed", "replayed", row["speedup"], [row["low"], row["high"]])
        for column, entry in (("predicted", predicted["columns"]), ("live", run["columns"])):
            if system in entry["system"]:
                at = entry["system"].index(system)
                span = None if column == "predicted" else [entry["low"][at], entry["high"][at]]
                origin = "predicted" if column == "predicted" else "measured"
                yield _cell(quantity, PAIR, column, origin, entry["speedup"][at], span)
    base, rule = policies[named["best fixed K"]], policies[named["threshold, draft prob."]]
    yield _cell("gain over best fixed K", PAIR, "replayed", "replayed", rule["speedup"] / base["speedup"] - 1.0, None)
    guess = {name: predicted["columns"]["speedup"][predicted["columns"]["system"].index(name)] for name in
             ("best fixed K", "threshold, draft prob.")}  # fmt: skip
    yield _cell("gain over best fixed K", PAIR, "predicted", "predicted",
                guess["threshold, draft prob."] / guess["best fixed K"] - 1.0, None)  # fmt: skip
    threshold = float(parse(named["threshold, draft prob."]).policy.threshold)  # type: ignore[union-attr]
    yield _cell("best h", PAIR, "replayed", "replayed", threshold, None)
    for key in ("discard_rate", "verification_rate"):
        quantity = f"{key.replace('_', ' ')} at K = 4"
        yield _cell(quantity, PAIR, "predicted", "predicted", modelled["fixed"][key][4], None)
        yield _cell(quantity, PAIR, "replayed", "replayed", policies["fixed:4"][key], None)
    oracle = policies["oracle"]
    yield _cell("oracle verification rate", PAIR, "predicted", "predicted", 1.0 - modelled["mean"], None)
    yield _cell("oracle verification rate", PAIR, "replayed", "replayed", oracle["verification_rate"], None)
    assert live["rows"]


def _cell(
    quantity: str, pair: str, column: str, origin: str, value: float, interval: Any, *, tag: str | None = None,
    source: str | None = None, within: bool | None = None, fitted: bool = False, declared: bool = False,
) -> Data:  # fmt: skip
    low, high = interval or (None, None)
    return {"quantity": quantity, "pair": pair, "column": column, "origin": origin, "value": value, "low": low,
            "high": high, "tag": tag, "source": source, "within": within, "fitted": fitted,
            "declared": declared}  # fmt: skip


def _table(store: Store) -> Data:
    cells = sorted(_cells(store), key=lambda cell: ORDER.index(cell["quantity"]))
    out = []
    for origin, tag, source in dict.fromkeys((cell["origin"], cell["tag"], cell["source"]) for cell in cells):
        own = [cell for cell in cells if (cell["origin"], cell["tag"], cell["source"]) == (origin, tag, source)]
        keys = [key for key in own[0] if key not in ("origin", "tag", "source")]
        out.append(series(origin if source is None else source, origin, tag=tag, source=source,
                          **pluck(own, *keys)))  # fmt: skip
    replayed = store.get("replayed")
    return {"series": out, "about": {"pair": replayed["pair"], "declared": COST_RATIO, "level": replayed["level"],
                                     "missed": store.get("prediction")["missed"], "order": ORDER,
                                     "num_requests": replayed["num_requests"]}}  # fmt: skip


def rows(data: Data) -> list[Data]:
    """The page's rows: quantity, pair and one cell (or None) for each of `COLUMNS`."""
    cells: dict[tuple[str, str], Data] = {}
    for entry in data["series"]:
        columns = entry["columns"]
        for values in zip(*columns.values(), strict=True):
            cell = dict(zip(columns, values, strict=True)) | {key: entry[key] for key in ("origin", "tag", "source")}
            cells.setdefault((cell["quantity"], cell["pair"]), {})[cell["column"]] = cell
    pairs = (*DATASETS, PAIR)
    order = sorted(cells, key=lambda key: (data["about"]["order"].index(key[0]), pairs.index(key[1])))
    return [{"quantity": q, "pair": p, **{name: cells[q, p].get(name) for name in COLUMNS}} for q, p in order]


def _table_caption(data: Data) -> str:
    about = data["about"]
    return (
        "Published, predicted and measured on one page. **Published**: read in SpecDec++'s README or a note that "
        "quotes the paper; in brackets what is *derived*, digitised from a plot or implied by other numbers. "
        "**Predicted**, datasets: from three numbers fitted to published figures (open: fitted, no prediction), with "
        f"what the rounding of those figures leaves open; {about['pair']['label']}: from the training half of its "
        f"trace. **Replayed**: on {about['num_requests']} requests of the test half, {100 * about['level']:g} % "
        "intervals clustered by request. **Live**: counts of the pair decoding, the same intervals. Times of the pair "
        f"are declared (a draft step {about['declared']:g} target calls). Beyond their intervals: "
        f"{'; '.join(about['missed'])}. The oracle decodes greedily in the paper. Source of the oracle: "
        f"{ORACLE.speedup.source} [{ORACLE.speedup.tag}]."
    )


RECIPES = (
    Recipe("summary", "Published, predicted, measured", ("prediction", "replayed", "modelled", "live"), _table,
           _table_caption),
)  # fmt: skip
