"""`specstop study`: keys, agreement with the published figures' own arithmetic, and fitted kept from predicted."""

import contextlib
import io
import json
import math

import pytest

from mdp.calibrate import best_fixed, rule_curve
from specstop.cli import main
from specstop.paper import DATASETS, FIXED_LENGTHS, ORACLE, RULE, TOKENS_PER_SECOND
from specstop.prediction import HEAD, MOST, SHARE, _curves, _Fit
from specstop.studies import STUDIES

TAGS = {"README", "code", "note", "note/README", "memory", "derived"}


@pytest.fixture(scope="module")
def study():
    """The JSON line of one study, run once."""
    kept = {}

    def study(name):
        if name not in kept:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main(["study", name, "--quick", "--json"]) == 0
            (line,) = out.getvalue().splitlines()
            kept[name] = json.loads(line, parse_constant=pytest.fail)
        return kept[name]

    return study


def figures():
    for data in DATASETS.values():
        yield from (data.best_fixed, data.specdec, data.gain)
    yield from (ORACLE.verification_rate, ORACLE.speedup, RULE.share_of_best)


def test_every_figure_has_a_source_and_a_known_tag():
    assert all(figure.tag in TAGS and figure.source and figure.rounding >= 0 for figure in figures())
    assert {data.rate_tag for data in DATASETS.values()} == {"derived"}  # digitised, never called published
    assert RULE.threshold in RULE.thresholds and RULE.weight in RULE.weights


def test_published_figures_agree_with_each_other():
    for name, data in DATASETS.items():
        speedup = TOKENS_PER_SECOND["SpecDec++"][name] / TOKENS_PER_SECOND["plain"][name]
        assert speedup == pytest.approx(data.specdec.value, abs=0.006)
        assert data.specdec.value / (1 + data.gain.value) == pytest.approx(data.best_fixed.value, abs=0.0101)
        lengths = list(data.verification_rate)
        assert lengths == list(data.discard_rate) == list(FIXED_LENGTHS[1:])
        for k in lengths:  # d = (K + 1) v - 1 up to what the end of the text cuts
            endless = (k + 1) * data.verification_rate[k] - 1
            assert 0.87 * endless < data.discard_rate[k] < endless


def test_the_prediction_table(study):
    result = study("paper")
    assert {
        "study",
        "fitted",
        "predicted",
        "missed",
        "largest_error",
        "alternatives",
        "numerical",
        "curves",
        "notes",
    } == set(result)
    assert result["numerical"]["error"] < 1e-4 and result["numerical"]["proven_width"] < 1e-3
    fitted = {(row["quantity"], row["dataset"]) for row in result["fitted"]}
    predicted = {(row["quantity"], row["dataset"]): row for row in result["predicted"]}
    assert not fitted & set(predicted)
    # what the fits were made to hit is nowhere called predicted
    assert ("SpecDec++ speedup", "Alpaca") not in predicted and ("best fixed-K speedup", "Alpaca") not in predicted
    assert ("gain over best fixed K", "Alpaca") not in predicted
    for row in predicted.values():
        low, high = row["interval"]
        assert low <= row["predicted"] <= high
        assert (row["published"] is None) == (row["error"] is None) == (row["tag"] is None) == (row["within"] is None)
    missed = {f"{quantity}, {name}" for (quantity, name), row in predicted.items() if row["within"] is False}
    assert missed == set(result["missed"])


def test_what_is_predicted_and_how_well(study):
    predicted = {(row["quantity"], row["dataset"]): row for row in study("paper")["predicted"]}
    errors = {key: row["error"] for key, row in predicted.items()}
    # these guard the numbers the README quotes, misses included
    assert errors["SpecDec++ speedup", "HumanEval"] == pytest.approx(0.003, abs=0.002)
    assert errors["SpecDec++ speedup", "GSM8K"] == pytest.approx(0.017, abs=0.002)
    assert errors["best fixed-K speedup", "HumanEval"] == pytest.approx(0.021, abs=0.002)
    assert errors["best fixed-K speedup", "GSM8K"] == pytest.approx(0.014, abs=0.002)
    assert errors["oracle speedup at the published v", "Alpaca"] == pytest.approx(0.006, abs=0.002)
    assert errors["oracle speedup from the mean", "Alpaca"] == pytest.approx(-0.027, abs=0.002)
    for name in DATASETS:
        assert predicted["best threshold h of the grid", name]["predicted"] == RULE.threshold
        better = predicted["optimum with the same head, no lag, no bias", name]["predicted"]
        assert better > DATASETS[name].specdec.value
    assert predicted["SpecDec++ speedup", "GSM8K"]["within"] is False  # a miss is called one


def test_what_rests_on_the_form_of_dispersion(study):
    other = {(row["quantity"], row["dataset"]): row for row in study("paper")["alternatives"]}
    for name, error in (("HumanEval", 0.002), ("GSM8K", 0.016)):
        assert other["SpecDec++ speedup", name]["error"] == pytest.approx(error, abs=0.002)
    for name in DATASETS:  # the note says so
        assert other["best threshold h of the grid", name]["predicted"] != RULE.threshold
        assert other[SHARE, name]["predicted"] < RULE.share_of_best.value


def test_the_fit_hits_what_it_was_fitted_to(study):
    fitted = {(row["quantity"], row["dataset"]): row["fitted"] for row in study("paper")["fitted"]}
    mean, ratio = fitted["mean acceptance", "Alpaca"], fitted["cost ratio t_draft / t_target", "Alpaca"]
    concentration = fitted["concentration of what the head sees", "Alpaca"]
    assert best_fixed(mean, ratio, FIXED_LENGTHS)[1] == pytest.approx(DATASETS["Alpaca"].best_fixed.value, rel=1e-6)
    curve = rule_curve("beta", mean, math.log(concentration), ratio, HEAD, MOST, RULE.thresholds)
    assert curve.throughput.max() == pytest.approx(DATASETS["Alpaca"].specdec.value, rel=1e-6)


def test_frontiers_bring_intervals_and_no_published_rule_curve():
    curves = _curves("HumanEval", _Fit("beta"), [_Fit("beta", 1, 1, 1), _Fit("beta", -1, -1, -1)])
    assert curves["rule_published"] is None and curves["fixed_published"]["origin"] == "derived"
    rule = curves["rule"]
    for name in ("speedup", "verification_rate", "discard_rate"):
        low, high = rule["intervals"][name]
        assert (low <= rule[name] + 1e-9).all() and (rule[name] <= high + 1e-9).all() and (low < high).any()
    assert (rule["numerical_bounds"][0] <= rule["speedup"]).all()
    # time per token is t_d (1 + d) + (V - t_d) v, whatever the rule
    v, d = curves["fixed"]["verification_rate"], curves["fixed"]["discard_rate"]
    ratio = _Fit("beta").cost_ratio
    assert 1 / (ratio * (1 + d) + (1 - ratio) * v) == pytest.approx(curves["fixed"]["speedup"], rel=1e-9)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("paper", {"fitted", "predicted"}, ("FITTED", "PREDICTED", "MISSED", "not available as numbers")),
        ("phase", {"optimum", "bounds", "width", "gain_of_optimum", "gain_of_threshold"}, ("cost ratio 0.211",)),
        ("information", {"world", "rungs"}, ("clairvoyant", "extra time")),
        ("self-tuning", {"optimum", "rules", "monotone", "counterexample"}, ("de-biased", "1.72414", "1.85714")),
    ],
)
def test_each_study_prints_a_line_and_a_text(study, name, keys, words):
    result = study(name)
    assert result["study"] == name and keys <= set(result)
    text = STUDIES[name].text(result)
    assert all(word in text for word in words)


def test_shares_are_in_order(study):
    share = {(row["rule"], row["head"]): row["share"] for row in study("self-tuning")["rules"]}
    assert share["look-ahead", "biased"] < share["look-ahead", "de-biased"] < share["look-ahead", "perfect"]
    assert share["optimal table", "perfect"] == pytest.approx(1.0, abs=1e-6)


def test_people_get_a_text(capsys):
    assert main(["study", "phase", "--quick"]) == 0
    out, err = capsys.readouterr()
    assert "best constant threshold on survival" in out and err == ""


def test_an_unknown_study_is_one_line(capsys):
    assert main(["study", "everything"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "everything" in err and "self-tuning" in err
