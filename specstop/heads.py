"""Train an acceptance head on a trace, judge it on the held-out half, and keep it: the verb `train-head`.

Everything is chosen on the training half of the requests: weights by gradient descent, when to stop and which of a
grid's heads to keep by requests held back from it, the threshold by replaying the training half. What is printed is
from the other half.
"""

import re
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specstop import inputs
from specstop.models import pair_options
from specstop.output import emit, json_line, jsonable, key_values, table
from specstop.traces import load_trace

if TYPE_CHECKING:
    from mdp.cost import Cost
    from mdp.fit import SignalModel
    from mdp.trace import Trace
    from realmodels.head import Head
    from realmodels.head_data import Examples
    from simulate.quality import Earned, Quality

__all__ = ["train_head", "with_head"]

DONE = 0
WEIGHTS, DEPTHS = (1.0, 3.0, 6.0, 12.0), (0, 1, 2, 3, 4)
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
DEFAULTS = {"published": (3, 6.0), "matched": (1, 1.0)}
"""Depth and weight of each variant: SpecDec++'s shared configuration [note], and ours."""
OURS = re.compile(r"(bundled|tiny|rtn|exit|lookup)(:[\w:=,.]*)?")
"""Models that a trace may name itself: no folder and no hub id, which only the user may ask for."""
BASELINES = ("draft_prob", "entropy", "token_accept_prob")
COLUMNS = (
    "variant", "depth", "weight", "kl", "kl_debiased", "auroc", "ece", "ece_debiased", "mean_predicted", "mean_true",
    "throughput", "throughput_se", "best_threshold", "gain", "gain_se", "seconds",
)  # fmt: skip


def with_head(trace: "Trace", folder: str | None) -> "Trace":
    """The trace with the predictions of the head in `folder`; as it is if there is none."""
    if folder is None:
        return trace
    from realmodels.head import apply_head, load_head

    return apply_head(load_head(folder), trace)


def train_head(args: Namespace) -> int:
    """Train one head, or a grid of them, and write the best."""
    from realmodels.head import VARIANTS, check_out, save_head

    check_out(Path(args.out))
    cost = None if args.cost is None else inputs.declared_cost(args.cost)
    trace = load_trace(args.trace)
    if cost is not None:
        inputs.check_depth(str(args.cost), cost, trace.max_candidates)
    variants = [args.variant] if args.variant else list(VARIANTS) if args.grid else ["matched"]
    recipes = _recipes(args, variants)
    examples = {recipe.variant: _examples(args, trace, recipe) for recipe in recipes[:: len(recipes) // len(variants)]}
    judge = Judge(trace, cost)
    heads, rows, reliability = _train_all(trace, recipes, examples, judge)
    best = min(range(len(rows)), key=lambda i: rows[i]["validation_kl"])
    row = rows[best]
    metrics = jsonable({key: value for key, value in row.items() if key != "seconds"})
    head = replace(heads[best], manifest={**heads[best].manifest, "metrics": metrics})
    about = judge.about() | {"trace": str(args.trace), "seed": args.seed}
    grid = jsonable({
        "rows": rows, "chosen": {key: row[key] for key in ("variant", "depth", "weight")}, **about,
        "reliability": reliability,
    })  # fmt: skip
    save_head(head, args.out, {"grid.json": grid} if args.grid else None)
    if args.json:
        emit(json_line(({"head": args.out} | grid) if args.grid else ({"head": args.out} | row | about)))
    else:
        emit(_text(rows, row, about, args.out))
    return DONE


def _recipes(args: Namespace, variants: Sequence[str]) -> list[Any]:
    from realmodels.head_training import Recipe

    out = []
    for variant in variants:
        depth, weight = DEFAULTS[variant]
        reads = None if args.inputs is None or (args.grid and variant == "published") else ("hidden", *args.inputs)
        depths = DEPTHS if args.grid and args.depth is None else (depth if args.depth is None else args.depth,)
        weights = WEIGHTS if args.grid and args.weight is None else (weight if args.weight is None else args.weight,)
        out += [
            Recipe(variant, d, w, shared_blocks=not args.separate_blocks, inputs=reads, seed=args.seed)
            for d in depths
            for w in weights
        ]
    return out


def _examples(args: Namespace, trace: "Trace", recipe: Any) -> "Examples":
    """The training half's examples; the published ones need the pair that recorded the trace, and its prompts."""
    from mdp.fit import split_requests
    from realmodels import head_data

    train, _ = split_requests(trace)
    if recipe.variant == "matched":
        return head_data.matched_examples(trace, train.tolist(), recipe.reads)
    from realmodels.pair import load_pair
    from realmodels.prompts import load_prompts

    models = trace.manifest.get("models") or {}
    specs = []
    for role in ("target", "draft"):
        spec = (models.get(role) or {}).get("spec")
        if getattr(args, role) is None and not (isinstance(spec, str) and OURS.fullmatch(spec)):
            raise ValueError(f"--{role}: give it; {args.trace} names {spec!r:.60}, which is not read at its word")
        specs.append(getattr(args, role) or spec)
    options = pair_options(args) | {"target": specs[0], "draft": specs[1]}
    pair = load_pair(**options | {"dtype": args.dtype or trace.manifest.get("dtype", "float32")})
    template = ((trace.manifest.get("prompts") or {}).get("template") or {}).get("name", "chat")
    prompts = head_data.prompts_of(trace, load_prompts(args.prompts, pair, template=template))
    return head_data.published_examples(pair, trace, prompts, train.tolist(), seed=args.seed)


def _train_all(
    trace: "Trace", recipes: Sequence[Any], examples: Mapping[str, "Examples"], judge: "Judge"
) -> tuple[list["Head"], list[dict[str, Any]], list[dict[str, Any]]]:
    """The heads, a row each, and the rows of their reliability."""
    from tqdm.auto import tqdm

    from realmodels.head_training import train_head

    heads, rows, reliability = [], [], []
    many = len(recipes) > 1
    for recipe in tqdm(recipes, desc="heads", unit="head", disable=None if many else True):
        start = time.perf_counter()
        head = train_head(trace, examples[recipe.variant], recipe, progress=False if many else None)
        seconds = time.perf_counter() - start
        heads.append(head)
        row, lines = judge.row(head)
        rows.append(row | {"seconds": seconds})
        reliability += lines
    return heads, rows, reliability


class Judge:
    """What heads are worth on the held-out half of a trace, beside baselines that need none."""

    def __init__(self, trace: "Trace", declared: "Cost | None"):
        from mdp.fit import fit_signal, split_requests
        from realmodels.head_training import fit_requests
        from simulate.quality import best_on, on_path, quality
        from simulate.replay import measured_cost

        self.trace, self.held = trace, fit_requests(trace)[1]
        self.train, self.test = split_requests(trace)
        self.costs: dict[str, Cost] = {} if declared is None else {"declared": declared}
        if trace.manifest.get("measured"):
            self.costs["measured"] = measured_cost(trace)
        mean = on_path(trace, self.train, trace.features["token_accept_prob"])[1].mean()
        every = np.ones(trace.num_positions)
        self.baselines: dict[str, dict[str, Any]] = {
            "constant": _figures(quality(*on_path(trace, self.test, mean * every)))
        }
        fixed = [f"fixed:{k}" for k in range(trace.max_candidates + 1)]
        self.fixed = {name: best_on(trace, fixed, self.train, self.test, c) for name, c in self.costs.items()}
        for signal in BASELINES:
            model = fit_signal(trace, signal, self.train)
            figures = _figures(quality(*on_path(trace, self.test, model.accept_prob(trace.features[signal]))))
            self.baselines[signal] = figures | self._earned(trace, f"rejection:{{}},signal={signal}", model)

    def row(self, head: "Head") -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Everything about one head, `gain` over the best fixed length, both chosen on the training half; and its
        reliability, ten rows before and ten after de-biasing."""
        from realmodels.head import apply_head
        from simulate.quality import on_path, quality, reliability

        raw, debiased = (apply_head(head, self.trace, debias=debias) for debias in (False, True))
        shown = on_path(raw, self.test, raw.optional["head"])
        mended = on_path(debiased, self.test, debiased.optional["head"])
        before, after = quality(*shown), quality(*mended)
        validation = quality(*on_path(debiased, self.held, debiased.optional["head"]))
        # the column is calibrated, and what comes late is shown late: the rule adds neither
        earned = self._earned(debiased, "specdecpp:threshold={},least=0,lag=0")
        training = head.manifest["training"]
        about = {"variant": head.variant, "depth": head.module.num_layers, "weight": head.rejection_weight}
        lines = [about | {"debiased": debias} | line for debias, seen in ((False, shown), (True, mended))
                 for line in reliability(*seen[:2])]  # fmt: skip
        return about | {
            "inputs": list(head.inputs), **_figures(before),
            **{f"{key}_debiased": value for key, value in _figures(after).items() if not key.startswith("auroc")},
            "mean_predicted": float(shown[0].mean()), "mean_predicted_debiased": float(mended[0].mean()),
            "mean_true": float(shown[1].mean()), "validation_kl": validation.kl.value, **earned,
            "best_epoch": training["best_epoch"], "num_examples": training["num_examples"],
        }, lines  # fmt: skip

    def about(self) -> dict[str, Any]:
        """What every head is compared with."""
        fixed = {name: _plain(found) for name, found in self.fixed.items()}
        origin = next(iter(fixed), None)
        return {
            "constant_kl": self.baselines["constant"]["kl"], "baselines": self.baselines, "cost_origin": origin,
            "best_fixed": fixed.get(origin or ""), "best_fixed_measured": fixed.get("measured"),
            "num_train_requests": len(self.train), "num_test_requests": len(self.test),
        }  # fmt: skip

    def _earned(self, trace: "Trace", rule: str, model: "SignalModel | None" = None) -> dict[str, Any]:
        """What a rule earns under each cost, and its gain over the best fixed length; the first cost has no prefix."""
        from simulate.estimate import paired
        from simulate.quality import best_on

        thresholds = {rule.format(h): h for h in THRESHOLDS}
        out: dict[str, Any] = {} if self.costs else dict.fromkeys(("throughput", "throughput_se", "best_threshold"))
        for number, (name, cost) in enumerate(self.costs.items()):
            best = best_on(trace, thresholds, self.train, self.test, cost, model)
            gain = paired(best.tally, self.fixed[name].tally)
            values = _plain(best) | {"best_threshold": thresholds[best.policy], "gain": gain.value, "gain_se": gain.se}
            del values["policy"]
            out |= {(key if number == 0 else f"{name}_{key}"): value for key, value in values.items()}
        return out


def _plain(best: "Earned") -> dict[str, Any]:
    return {"policy": best.policy, "throughput": best.throughput.value, "throughput_se": best.throughput.se}


def _figures(found: "Quality") -> dict[str, float]:
    return {
        name + end: value
        for name, estimate in found._asdict().items()
        for end, value in (("", estimate.value), ("_se", estimate.se))
    }


def _text(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], about: Mapping[str, Any], out: str) -> str:
    """Tables, and in words what they do and do not say."""
    columns = [name for name in COLUMNS if row.get(name) is not None]
    others = [{"input": name, **about["baselines"][name]} for name in about["baselines"]]
    wanted = ("input", "kl", "auroc", "ece", "throughput", "throughput_se", "best_threshold", "gain", "gain_se")
    shown = [name for name in wanted if any(name in other for other in others)]
    lines = [
        f"on {about['num_test_requests']} requests held out; thresholds were chosen on the other "
        f"{about['num_train_requests']}",
        table(rows, columns),
        "what needs no head, calibrated on the training half (token_accept_prob: a perfect head, which nobody has):",
        table(others, shown),
    ]
    best = about["best_fixed"]
    words = [f"kept in {out}: {row['variant']}, depth {row['depth']}, weight {row['weight']:g}, by KL on requests held "
             "back from training"]  # fmt: skip
    plain = about["baselines"]["draft_prob"]
    # Both are judged on the same requests, so the errors taken as independent are larger than their difference's.
    more, error = row["kl_debiased"] - plain["kl"], float(np.hypot(row["kl_se_debiased"], plain["kl_se"]))
    verdict = "this head predicts " + ("worse" if more > 0 else "better") if abs(more) > 2.0 * error else (
        "these requests do not tell which predicts better")  # fmt: skip
    words.append(
        f"the drafted token's own probability, calibrated, has KL {plain['kl']:.3f} and AUROC {plain['auroc']:.3f}: "
        f"{verdict} (KL {row['kl_debiased']:.3f}, AUROC {row['auroc']:.3f}; KL differs by {more:.3f}, standard "
        f"error at most {error:.2g})"
    )
    if best:
        clear = abs(row["gain"]) > 2.0 * row["gain_se"]
        words.append(
            f"best fixed length {best['policy']}: {best['throughput']:.4g} ({about['cost_origin']} times); the head "
            f"gains {row['gain']:.3g} on it, standard error {row['gain_se']:.2g}"
            + ("" if clear else ": not clear of 0")
        )
    if about["best_fixed_measured"] and about["cost_origin"] != "measured":
        words.append(
            key_values({
                "under measured times": f"{about['best_fixed_measured']['policy']} "
                f"{about['best_fixed_measured']['throughput']:.4g}, head {row['measured_throughput']:.4g} tokens/s",
            })
        )  # fmt: skip
    return "\n\n".join([*lines, "\n".join(words)])
