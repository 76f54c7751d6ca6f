"""One contract for every rule in the registry, whatever holds its numbers."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdp.entrants import catalogue, label, needs
from mdp.policy import RULES, Observation, Outcome, parse
from simulate.replay import _map
from simulate.rounds import _register

DEPTH, LANES, ROUNDS = 6, 4, 12
VARIANTS = [
    "fixed:2", "hf_constant:length=3", "hf_heuristic:length=2,up=1,least=2", "diffuspec:least=1,most=5,growth=2",
    "sglang_ema:interval=1,warmup=0", "sglang_ema:steps=0/1/3/6,interval=2,warmup=0", "banditspec:released=1",
    "banditspec:lengths=0/2/5,warmup=3,width=2", "ralmspec:overlap=1,step=0.3,verify=1", "ralmspec:cap=0.9",
    "specdecpp:lag=0,strict=0,weight=6,least=0", "specdecpp_ideal:inflation=1,lag=0,most=4", "svip:scale=1",
    "adaedl:target=0.3,step=0.1,most=4", "llamacpp:p_min=0.5,n_max=5", "hf_auto:warmup=0", "last_round:lengths=1/3",
    "tapout:most=5,mix=0.2",
]  # fmt: skip
TEXTS = [rule.example for name, rule in RULES.items() if name != "optimal"] + VARIANTS
SEEN = [name for name in Observation._fields if name != "num_candidates"]


def world(seed=1):
    """Features [ROUNDS, DEPTH, LANES] and, per round and lane, how many candidates would be accepted."""
    rng = np.random.default_rng(seed)
    shape = (ROUNDS, DEPTH, LANES)
    features = {name: rng.uniform(0.05, 1.0, shape) for name in SEEN}
    features["entropy"] = rng.exponential(0.8, shape)
    features["next_accepted"] = rng.random(shape) < 0.7
    features["survival"] = np.cumprod(rng.uniform(0.6, 1.0, shape), axis=1)
    for name in ("draft_prob", "top_prob", "entropy", "head", "token_accept_prob"):
        features[name][:, 0] = np.nan  # nothing is drafted yet
    return features, rng.integers(0, DEPTH + 1, (ROUNDS, LANES)), rng.uniform(0.1, 0.3), rng.uniform(0.5, 2.0)


def shown(rule, features, at, array):
    return {name: array(features[name][at]) for name in needs(rule)}


def outcome(drafted, would, draft_time, verify_time):
    fewer = (would < drafted) * 1
    return Outcome(drafted, fewer * would + (1 - fewer) * drafted, drafted * draft_time, drafted * 0.1 + verify_time)


def by_float(rule):
    """Lengths [ROUNDS, LANES] and final states, one lane after the other in Python floats."""
    features, would, *times = world()
    lengths, states = np.zeros((ROUNDS, LANES), dtype=int), []
    for lane in range(LANES):
        state = rule.init()
        for r in range(ROUNDS):
            drafted = 0
            while drafted < DEPTH:
                seen = shown(rule, features, (r, drafted, lane), lambda x: x.item())
                state, stop = rule.stop(state, Observation(drafted, **seen))
                if stop:
                    break
                drafted += 1
            state = rule.end_round(state, outcome(drafted, int(would[r, lane]), *times))
            lengths[r, lane] = drafted
        states.append(state)
    return lengths, states


def by_array(rule, start, array, where, ask, end, count=lambda values: values):
    """The same side by side, as the worlds do it: who has stopped keeps the state of that moment."""
    features, would, *times = world()
    state, lengths = start, []
    for r in range(ROUNDS):
        drafting, drafted = array(np.ones(LANES, dtype=bool)), array(np.zeros(LANES, dtype=np.int64))
        for k in range(DEPTH):
            asked, stop = ask(state, k, shown(rule, features, (r, k), array))
            state = _map(lambda new, old, on=drafting: where(on, new, old), asked, state)
            drafting = drafting & (where(drafting, stop, stop) == 0)
            drafted = drafted + drafting * 1
        state = end(state, outcome(count(drafted), count(array(would[r])), *times))
        lengths.append(np.asarray(drafted))
    return np.array(lengths), state


def leaves(state):
    return [np.broadcast_to(np.asarray(leaf, dtype=float), LANES) for leaf in jax.tree_util.tree_leaves(state)]


def assert_same(rule, lengths, state):
    expected, states = by_float(rule)
    np.testing.assert_array_equal(lengths, expected)
    for position, leaf in enumerate(leaves(state)):
        column = [float(jax.tree_util.tree_leaves(one)[position]) for one in states]
        np.testing.assert_allclose(leaf, column, rtol=1e-9, atol=1e-9)


def test_every_rule_is_here_once_and_has_a_variant_that_moves():
    assert {text.partition(":")[0] for text in TEXTS} == set(RULES) - {"optimal"}
    lengths = {text: by_float(parse(text).policy)[0] for text in TEXTS}
    for name in set(RULES) - {"optimal"}:
        mine = [lengths[text] for text in TEXTS if text.partition(":")[0] == name]
        assert any((x > 0).any() and (x < DEPTH).any() for x in mine), name


@pytest.mark.parametrize("text", TEXTS)
def test_float_and_numpy_agree_and_nothing_given_is_changed(text):
    rule = parse(text).policy

    def array(values):
        out = np.array(values)
        out.flags.writeable = False
        return out

    def ask(state, k, seen):
        _map(lambda leaf: leaf.setflags(write=False), state)
        first, again = (rule.stop(state, Observation(k, **seen)) for _ in range(2))
        for one, other in zip(leaves(first[0]), leaves(again[0]), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(first[1], again[1])
        return first

    start = _map(lambda leaf: np.repeat(np.asarray(leaf, dtype=float)[..., None], LANES, axis=-1), rule.init())
    assert_same(rule, *by_array(rule, start, array, np.where, ask, rule.end_round))


@pytest.mark.parametrize("text", TEXTS)
def test_float_and_compiled_jax_agree(text):
    rule = parse(text).policy
    _register(type(rule))
    with jax.enable_x64(True):
        # The parameters are traced too: another value is no other program.
        traced = jax.tree_util.tree_map(jnp.asarray, rule)
        ask = jax.jit(lambda rule, state, k, seen: rule.stop(state, Observation(k, **seen)))
        end = jax.jit(lambda rule, state, outcome: rule.end_round(state, outcome))
        start = jax.tree_util.tree_map(lambda leaf: jnp.full(LANES, leaf, dtype=jnp.float64), rule.init())
        lengths, state = by_array(
            rule, start, jnp.asarray, jnp.where,
            lambda state, k, seen: ask(traced, state, jnp.asarray(k), seen),
            lambda state, outcome: end(traced, state, outcome),
        )  # fmt: skip
        assert_same(rule, lengths, state)


@pytest.mark.parametrize("text", TEXTS)
def test_float_and_torch_agree(text):
    torch = pytest.importorskip("torch")
    rule = parse(text).policy
    start = _map(lambda leaf: torch.full((LANES,), float(leaf), dtype=torch.float64), rule.init())

    def where(condition, new, old):
        new, old = (torch.as_tensor(x).expand(LANES) for x in (new, old))
        return torch.where(condition, new, old)

    lengths, state = by_array(
        rule, start, torch.as_tensor, where, lambda state, k, seen: rule.stop(state, Observation(k, **seen)),
        rule.end_round, count=lambda values: values.double(),  # an int64 tensor and a float make float32
    )  # fmt: skip
    assert_same(rule, lengths, state)


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_rule_says_it_needs_is_what_it_reads(text):
    rule = parse(text).policy
    everything = dict.fromkeys(SEEN, 0.5)
    only = {name: everything[name] for name in needs(rule)}
    state, _ = rule.stop(rule.init(), Observation(0, **only))
    for k in (1, 2):
        rule.stop(state, Observation(k, **only))
    for name in needs(rule):
        with pytest.raises(TypeError):
            for k in (1, 2):
                rule.stop(state, Observation(k, **(only | {name: None})))
    if not rule.timed:
        rule.end_round(rule.init(), Outcome(2, 1))
    else:
        with pytest.raises(TypeError):
            rule.end_round(rule.init(), Outcome(2, 1))


def test_that_check_can_fail():
    class Liar(type(parse("svip").policy)):
        needs = ("top_prob",)

    with pytest.raises(TypeError):
        Liar().stop((), Observation(1, top_prob=0.5))


@pytest.mark.parametrize("text", [*TEXTS, "rejection:0.123456789012345", "svip:threshold=0.1234567890123"])
def test_a_label_is_a_string_that_gives_the_rule_back(text):
    rule = parse(text).policy
    assert parse(label(rule)).policy == rule


def test_a_label_names_only_what_differs():
    assert label(parse("kangaroo:threshold=0.4,most=6").policy) == "kangaroo:threshold=0.4"
    assert label(parse("sglang_ema:steps=1/2").policy) == "sglang_ema:steps=1/2"
    assert label(replace(parse("disco").policy, outer=(1.0, 2.0))) == "disco (fitted)"


PARAMETERS = [(name, f) for name, rule in RULES.items() if rule.cls for f in fields(rule.cls) if f.metadata]


@pytest.mark.parametrize(("name", "field"), PARAMETERS, ids=[f"{name}:{f.name}" for name, f in PARAMETERS])
def test_a_parameter_takes_its_default_and_nothing_out_of_range(name, field):
    shown = "/".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
    assert parse(f"{name}:{field.name}={shown}").policy == parse(name).policy
    low, high = field.metadata["low"], field.metadata["high"]
    assert field.metadata["origin"] in ("code", "paper", "note", "ours")
    for value in (low - 1, high + 1, "nan", "", "x", "0.5.5"):
        with pytest.raises(ValueError, match=f"{field.name} must be") as error:
            parse(f"{name}:{field.name}={value}")
        assert "\n" not in str(error.value) and str(error.value).startswith(f"policy '{name}:")


BAD = {
    "svip:0.3": "expected svip[:threshold=0.3",
    "svip:speed=3": "unknown parameter 'speed'",
    "svip:fit=1": "unknown parameter 'fit'",
    "svip:signal=entropy": "not taken by this rule",
    "disco:fit=2": "fit must be 0 or 1",
    "kangaroo:most=2.5": "most must be a whole number",
    "sglang_ema:steps=3/1": "steps must increase, got (3, 1)",
    "sglang_ema:steps=1/x": "steps must be whole numbers in 0..1024 with / between them",
    "banditspec:warmup=3": "warmup must play all 4 lengths, got 3",
    "diffuspec:least=31": "least must be at most most = 30, got 31",
    "hf_confidence:threshold=0.1,threshold=0.2": "threshold is given twice",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=BAD)
def test_a_bad_parameter_is_refused_in_one_line(text, message):
    with pytest.raises(ValueError) as error:
        parse(text)
    assert message in str(error.value) and repr(text) in str(error.value) and "\n" not in str(error.value)


def test_all_rules_is_all_rules():
    names = [spec.text.partition(":")[0] for spec in catalogue(8)]
    assert names == list(RULES)
    fitted = [spec for spec in catalogue(2, fits=True) if spec.fit]
    assert [spec.text for spec in fitted] == [f"{name}:fit=1" for name, rule in RULES.items() if rule.fits]
    assert catalogue(2)[0].text == "fixed:2"
