"""What `audit` prints for people: the one line, the ladder, and what to run."""

from collections.abc import Mapping
from typing import Any

from specstop.output import key_values, table

__all__ = ["audit_text"]


def audit_text(result: Mapping[str, Any]) -> str:
    """The audit's JSON as text."""
    deployed, setting = result["deployed"], result["setting"]
    limit = f"z: the limit of {result['ceiling']}"
    about = {
        "policy": deployed["policy"],
        "looks at": deployed["information"],
        "throughput": deployed["throughput"]["value"],
        "interval": deployed["throughput"]["interval"],
        "replayed": deployed["replayed"]["value"],
        "scored on": f"{result['num_requests']} requests, {result['num_trained']} others to fit and choose on",
        "times": f"{result['cost_origin']}, draft step {result['draft_time']:.5g}, V(0) {result['verify_time'][0]:.5g}",
    }
    lines = [f"{result['headline']}  (% of its time, same information; {limit}; level {result['level']:g})"]
    if result["modelled"] is not None:
        lines.append(f"{_percent(result['modelled'])} left to rules that read its signal, if the fitted chain is true")
    rows = [
        {
            "information": rung["information"],
            "bound": rung["bound"],
            "throughput": _bracketed(rung["throughput"]),
            "speedup": rung["speedup"],
            "left %": _percent(rung["left"]),
            "over the rung below %": _percent(rung["step"]),
            "rule": rung["policy"],
        }
        for rung in result["ladder"]
    ]
    if setting["change"]:
        advice = f"use {setting['policy']}: saves {_percent(setting['gain'])} % of the time"
    else:
        advice = f"keep {setting['policy']}: nothing found that saves time clear of zero"
    return "\n\n".join(["\n".join(lines), key_values(about), table(rows), "\n".join([advice, *result["notes"]])])


def _percent(estimate: Mapping[str, Any] | None) -> str | None:
    if estimate is None:
        return None
    value, low, high = (100 * x for x in (estimate["value"], *estimate["interval"]))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _bracketed(estimate: Mapping[str, Any] | None) -> str | None:
    if estimate is None:
        return None
    return "{:.4g} [{:.4g}, {:.4g}]".format(estimate["value"], *estimate["interval"])
