"""Published rules in the live loop: greedy runs equal the replay round by round, and rules that read times run."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from mdp.entrants import Lacking, needs  # noqa: E402
from mdp.policy import RULES, parse  # noqa: E402
from realmodels.decode import decode, decode_all  # noqa: E402
from realmodels.pair import load_pair  # noqa: E402
from realmodels.record import record  # noqa: E402
from simulate.replay import fitted, replay_rounds  # noqa: E402

torch.set_num_threads(1)

SETTINGS = {"max_candidates": 5, "max_new_tokens": 24, "temperature": 0}
LIVE = {"draft_prob", "top_prob", "entropy"}
RULED = [name for name, rule in RULES.items() if rule.cls and name not in ("optimal", "oracle", "fixed")]
EXACT = [name for name in RULED if set(RULES[name].cls.needs) <= LIVE and not RULES[name].cls.timed]


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny:5", "tiny")


@pytest.fixture(scope="module")
def recorded(pair, tmp_path_factory):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 24, rng.integers(1, 9)).tolist() for _ in range(10)]
    return prompts, record(pair, prompts, tmp_path_factory.mktemp("t"), **SETTINGS, timing_repeats=0)


def test_enough_rules_are_compared():
    assert {"hf_heuristic", "svip", "adaedl", "tapout", "disco", "sglang_ema", "hf_auto"} <= set(EXACT)


@pytest.mark.parametrize("text", [*EXACT, "adaedl:threshold=0.1,target=0.2,step=0.1", "svip:threshold=0.9"])
def test_greedy_live_run_equals_replay(pair, recorded, text):
    prompts, trace = recorded
    log = replay_rounds(trace, text)
    runs = decode_all(pair, prompts, text, **SETTINGS)
    for r, run in enumerate(runs):
        mine = log.request == r
        columns = (log.num_drafted, log.num_accepted, log.num_emitted, log.num_cut)
        assert run.rounds == list(zip(*(column[mine].tolist() for column in columns), strict=True)), f"request {r}"


@pytest.mark.parametrize("policy", [RULES[name].example for name in RULED if name not in EXACT])
def test_other_rules_run_live_or_say_what_they_lack(pair, recorded, policy):
    prompts, _ = recorded
    read = needs(parse(policy).policy)
    options = SETTINGS | {"score": bool(read & {"token_accept_prob", "survival"})}
    missing = read - LIVE - {"token_accept_prob", "survival"}
    if missing:
        with pytest.raises(Lacking, match="needs") as error:
            decode(pair, prompts[0], policy, **options)
        assert error.value.field in missing
    else:
        assert decode(pair, prompts[0], policy, **options).tally.num_emitted > 0


def test_a_fitted_rule_runs_live(pair, recorded):
    from mdp.cost import Affine

    prompts, trace = recorded
    spec = parse("hf_confidence:fit=1")
    with pytest.raises(ValueError, match="not fitted"):
        decode(pair, prompts[0], spec, **SETTINGS)
    rule = fitted(trace, spec, cost=Affine(0.2, 1.0))
    assert rule.threshold != spec.policy.threshold
    assert decode(pair, prompts[0], rule, **SETTINGS).tally.num_emitted > 0
