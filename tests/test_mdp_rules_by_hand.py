"""Each rule against decisions worked out by hand from its source's definition.

A round is written as what its candidates show and how many of them would be accepted; what comes back is how many the
rule drafted. Numbers in comments are the arithmetic of the definition, not the output of the code.
"""

import math

import pytest

from mdp.policy import Observation, Outcome, parse
from mdp.rules.bandits import next_log
from mdp.rules.heads import Disco

DRAFT_TIME, VERIFY_TIME = 0.2, 1.0


def play(text, rounds, room=50, **always):
    """Lengths of the rounds that `text` drafts; each round is (what the candidates show, how many are accepted)."""
    rule = parse(text).policy if isinstance(text, str) else text
    state, lengths = rule.init(), []
    for shown, would in rounds:
        shown = [{}] * room if shown is None else shown
        drafted, last = 0, {}
        while True:
            state, stop = rule.stop(state, Observation(drafted, **(always | last)))
            if stop or drafted == room:
                break
            assert drafted < len(shown), "the rule drafts on where it should have stopped"
            last = shown[drafted]
            drafted += 1
        accepted = min(would, drafted)
        state = rule.end_round(state, Outcome(drafted, accepted, drafted * DRAFT_TIME, VERIFY_TIME))
        lengths.append(drafted)
    return lengths


def shows(name, *rounds, **others):
    """Rounds whose candidates show one feature; nothing is accepted."""
    return [([{name: value, **others} for value in values], 0) for values in rounds]


def lengths_only(*accepted):
    return [(None, m) for m in accepted]


# --- Confidence of the last candidate


def test_hf_confidence_submits_the_unsure_candidate_and_a_tie_goes_on():
    # candidate_generator.py: stop after a token with q < .4; at most 20
    rounds = shows("draft_prob", [0.9, 0.5, 0.39], [0.4, 0.1], [0.2], [0.9] * 20)
    assert play("hf_confidence", rounds, draft_prob=math.nan) == [3, 2, 1, 20]
    assert play("hf_confidence:threshold=0.6,most=4", rounds, draft_prob=math.nan) == [2, 1, 1, 4]


def test_llamacpp_at_its_defaults_is_three_candidates():
    rounds = shows("draft_prob", [0.9, 0.1, 0.1], [0.001] * 3)
    assert play("llamacpp", rounds, draft_prob=math.nan) == [3, 3]
    assert play("llamacpp:p_min=0.5,n_max=8", shows("draft_prob", [0.9, 0.5, 0.4], [0.9] * 8), draft_prob=0) == [3, 8]


def test_kangaroo():
    # stop before the next token when the top probability of the last one is < .6; steps 6; at least one candidate
    rounds = shows("top_prob", [0.7, 0.6, 0.59], [0.1], [0.9] * 6)
    assert play("kangaroo", rounds, top_prob=math.nan) == [3, 1, 6]
    assert play("kangaroo:threshold=0.4", shows("top_prob", [0.59, 0.41, 0.4, 0.3]), top_prob=math.nan) == [4]


def test_bild_falls_back_below_its_threshold():
    assert play("bild:threshold=0.7", shows("top_prob", [0.9, 0.7, 0.6], [0.9] * 50), top_prob=math.nan) == [3, 50]


def test_svip_as_released_and_as_printed():
    # sqrt(.15 H) > .3 iff H > .6; sqrt(H) > .3 iff H > .09; at most 40
    rounds = shows("entropy", [0.1, 0.59, 0.61], [0.7], [0.0] * 40)
    assert play("svip", rounds, entropy=math.nan) == [3, 1, 40]
    assert play("svip:scale=1", rounds[:1], entropy=math.nan) == [1]
    assert play("svip:scale=1", shows("entropy", [0.08, 0.091]), entropy=math.nan) == [2]


def test_adaedl_threshold():
    # 1 - sqrt(.2 H) < .4 iff H > 1.8
    assert play("adaedl:threshold=0.4", shows("entropy", [1.0, 1.79, 1.81]), entropy=math.nan) == [3]
    assert play("adaedl", shows("entropy", [0.0] * 7), entropy=math.nan) == [7]


def test_adaedl_update():
    rule = parse("adaedl:threshold=0.4").policy
    # r = .5 * 0 + .5 * 1/2 = .25 < .9: lambda' = .41; lambda = .9 * .4 + .1 * .41
    first = rule.end_round(rule.init(), Outcome(2, 1))
    assert first == pytest.approx((0.401, 0.25))
    # r = .125 + .5 * 7/7 = .625 < .9: lambda' = .411
    assert rule.end_round(first, Outcome(7, 7)) == pytest.approx((0.9 * 0.401 + 0.1 * 0.411, 0.625))
    # r = .5 * .95 + .5 = .975 >= .9: down, unless all 7 of the longest round were accepted
    assert rule.end_round((0.5, 0.95), Outcome(3, 3)) == pytest.approx((0.9 * 0.5 + 0.1 * 0.49, 0.975))
    assert rule.end_round((0.5, 0.95), Outcome(7, 7)) == pytest.approx((0.5, 0.975))
    assert rule.end_round((0.5, 0.95), Outcome(0, 0)) == pytest.approx((0.5, 0.95))


# --- Heads


def test_specdecpp_as_released_scores_one_candidate_late():
    # products .5, .25: 1 - .25 = .75 > .7 is known with two candidates scored, asked with three drafted
    heads = shows("head", [0.5, 0.5, 0.9])
    assert play("specdecpp", heads, head=math.nan) == [3]
    assert play("specdecpp:lag=0", heads, head=math.nan) == [2]


def test_specdecpp_bounds_override_the_head():
    assert play("specdecpp:lag=0", shows("head", [0.01, 0.01]), head=math.nan) == [2]  # not before 2
    assert play("specdecpp:lag=0,least=0", shows("head", [0.01]), head=math.nan) == [1]
    assert play("specdecpp", shows("head", [1.0] * 20), head=math.nan) == [20]


def test_specdecpp_is_strict():
    heads = shows("head", [0.5, 1.0, 0.9])  # 1 - .5 is the threshold
    assert play("specdecpp:threshold=0.5,lag=0,least=0", heads, head=math.nan) == [3]
    assert play("specdecpp:threshold=0.5,lag=0,least=0,strict=0", heads, head=math.nan) == [1]


def test_specdecpp_starts_every_round_anew():
    heads = shows("head", [0.5, 0.5, 0.9], [0.9, 0.9, 0.9, 0.9, 0.4, 0.9])
    # .9^4 * .4 = .262: 1 - .262 > .7 with five scored, six drafted
    assert play("specdecpp", heads, head=math.nan) == [3, 6]


def test_specdecpp_head_without_its_bias():
    # w = 6: a reported rejection of .7 is one of .28 (a = 6 * .3 / (.7 + 1.8) = .72)
    assert play("specdecpp:lag=0,least=0,threshold=0.27,weight=6", shows("head", [0.3]), head=math.nan) == [1]
    assert play("specdecpp:lag=0,least=0,threshold=0.29,weight=6", shows("head", [0.3, 0.3]), head=math.nan) == [2]


def test_specdecpp_ideal_reports_what_training_makes_of_the_truth():
    # a = .72 is reported as .72 / (.72 + 6 * .28) = .3
    text = "specdecpp_ideal:lag=0,least=0,threshold="
    truth = shows("token_accept_prob", [0.72, 0.1])
    assert play(f"{text}0.69", truth, token_accept_prob=math.nan) == [1]
    assert play(f"{text}0.71", truth, token_accept_prob=math.nan) == [2]
    assert play(f"{text}0.27,weight=6", truth, token_accept_prob=math.nan) == [1]
    assert play(f"{text}0.29,weight=6", truth, token_accept_prob=math.nan) == [2]


def test_disco():
    nothing = {"top_prob": math.nan, "draft_prob": math.nan, "entropy": math.nan}
    # not fitted: sigma(max q - .5) < .5 iff max q < .5
    rounds = shows("top_prob", [0.9, 0.5, 0.49], draft_prob=0.1, entropy=9.0)
    assert play("disco", rounds, **nothing) == [3]
    assert play("disco:most=2", rounds, **nothing) == [2]
    # f = 2 max(0, top) - 3 max(0, H - 1) + .1 - .5 max(0, i - 2); sigma(f) < .3 iff f < -.847
    net = Disco(0.3, 20, ((1.0, 0, 0, 0, 0.0), (0, 0, 1.0, 0, -1.0), (0, 0, 0, 1.0, -2.0)), (2.0, -3.0, -0.5, 0.1))
    # .8 + .1 | .8 - 3 * .5 + .1 = -.6 | .8 - 1.5 + .1 - .5 = -1.1
    shown = [{"top_prob": 0.4, "draft_prob": 0.2, "entropy": h} for h in (0.5, 1.5, 1.5)]
    assert play(net, [(shown, 0)], **nothing) == [3]
    shown[1] = {"top_prob": 0.4, "draft_prob": 0.2, "entropy": 1.6}  # .8 - 1.8 + .1 = -.9
    assert play(net, [(shown, 0)], **nothing) == [2]
    # 3 max(0, H - 1) - .5 > -.847 however low the entropy
    net = Disco(0.3, 3, ((0, 0, 1.0, 0, -1.0),), (3.0, -0.5))
    assert play(net, [([{"top_prob": 0.4, "draft_prob": 0.2, "entropy": 0.2}] * 3, 0)], **nothing) == [3]


# --- Lengths from past rounds


def test_hf_constant_takes_the_room_there_is():
    assert play("hf_constant", lengths_only(3, 20)) == [20, 20]
    assert play("hf_constant", lengths_only(3, 20), room=7) == [7, 7]


@pytest.mark.parametrize("name", ["hf_heuristic", "hf_transient"])
def test_hf_heuristic(name):
    # 5; all accepted: +2; else -1, at least 1
    assert play(name, lengths_only(5, 6, 6, 0, 0, 0, 0, 0, 0, 0, 1)) == [5, 7, 6, 8, 7, 6, 5, 4, 3, 2, 1]
    assert play(f"{name}:length=2", lengths_only(0, 0, 0, 1, 1)) == [2, 1, 1, 1, 3]
    assert parse(name).policy.persists == (name == "hf_heuristic")
    # "accepted whole" is said of the candidates that there were, fewer than K for want of room
    assert parse(name).policy.end_round(5.0, Outcome(3, 3)) == 7


def test_diffuspec():
    # means from 0 with weight 1/2; drafted 10, 10 accepted: 5 >= 5: 5 + 3 = 8. drafted 8, 2: 6.5 > 3.5: 6.
    # drafted 6, 6: 6.25 > 4.75: 6. drafted 6, 6: 6.125 > 5.375: 6
    text = "diffuspec:least=2,most=10,growth=3"
    assert play(text, lengths_only(10, 2, 6, 6, 0)) == [10, 8, 6, 6, 6]
    # 30 first; drafted 30: mean 15, whole: 15 + 10 = 25; then 20 < mean 22.5 .. and never below 20
    assert play("diffuspec", lengths_only(30, 0, 0, 0)) == [30, 25, 20, 20]
    assert play("diffuspec", lengths_only(30, 30), room=30) == [30, 25]


def test_sglang_ema_moves_by_its_thresholds():
    # steps 1, 3, 5, 7 from 5 with mean 4; up from 5 above 4.5: .8 * 4 + .2 * 5 = 4.2, 4.36, 4.488, 4.59
    text = "sglang_ema:warmup=0,interval=1"
    rises = play(text, lengths_only(5, 5, 5, 5, 5))
    assert rises == [5, 5, 5, 5, 7]
    # then nothing accepted: 3.67 <= 4.25: 5; 2.94, 2.35 > 2.25; 1.88 <= 2.25: 3; 1.5, 1.2, .96, .77, .62, .49, .39, .32
    # and .25 <= .25? 4.5904 * .8^13 = .2524, 14 times .2019: 1
    falls = play(text, lengths_only(5, 5, 5, 5, *[0] * 16))
    assert falls == [5, 5, 5, 5, 7, 5, 5, 5, *[3] * 10, 1, 1]


def test_sglang_ema_waits_for_warmup_and_interval():
    # the first look is after round 10 + 5
    assert play("sglang_ema", lengths_only(*[5] * 17)) == [*[5] * 15, 7, 7]
    # up to 7 there, then down after rounds 20 (mean of .8^5 and less): 7 -> 3 in one go
    assert play("sglang_ema", lengths_only(*[5] * 15, *[0] * 6)) == [*[5] * 15, *[7] * 5, 3]


def test_sglang_ema_comes_back_from_no_drafting():
    # steps 0, 1, 3 from 1 with mean 0: 0 <= .5 - .25: 0; from 0 the next step is tried
    assert play("sglang_ema:steps=0/1/3,warmup=0,interval=1", lengths_only(0, 0, 1, 1, 1)) == [1, 0, 1, 0, 1]


def test_sglang_ema_does_not_go_down_and_up_at_once():
    # from 5 with mean 4: 4 <= 3 - .5 + 2: down to 3, where 4 > 3 - .5 - 2 would lead up again
    assert play("sglang_ema:steps=3/5,warmup=0,interval=1,up=-2,down=2", lengths_only(4, 0)) == [5, 3]


def test_last_round():
    text = "last_round:lengths=1/2/4,first=3"
    assert play(text, lengths_only(0, 1, 1, 2, 9, 0)) == [3, 1, 2, 2, 4, 4]
    assert play("last_round", lengths_only(3, 1)) == [3, 4]


OWN = "step=0.2,verify=1"


def test_ralmspec_stride():
    # match rate = min(1/1, .6): (1-.36)1.2 >= .4*1.4; (1-.216)1.4 = 1.098 >= .64*1.6 = 1.024;
    # (1-.1296)1.6 = 1.393 < .784*1.8 = 1.411: 3. Then 2/3 -> .6: 3. Then 2/4 = .5: 3, since
    # (1-.125)1.4 = 1.225 >= .75*1.6 = 1.2 and (1-.0625)1.6 = 1.5 < .875*1.8. Then 2/5 = .4: 2, since
    # (1-.16)1.2 >= .6*1.4 and (1-.064)1.4 = 1.310 < .84*1.6 = 1.344.
    assert play(f"ralmspec:{OWN}", lengths_only(1, 1, 0, 0, 0)) == [1, 3, 3, 3, 2]


def test_ralmspec_forgets_after_five_rounds():
    # after five rounds without a match their rate is 0: (1 - 0) * 1.2 < 1.4: 1
    assert play("ralmspec:step=0.2,verify=1", lengths_only(1, 0, 0, 0, 0, 0, 0))[-1] == 1
    # and not earlier: with one match in five it is .2: (1 - .04) * 2.2 = 2.112 >= .8 * 2.4 = 1.92: 2;
    # (1 - .008) * 2.4 = 2.381 < .96 * 2.6 = 2.496; one in six would do too: .972 * 2.2 >= .833 * 2.4
    assert play("ralmspec:step=0.2,verify=2", lengths_only(1, 0, 0, 0, 0, 0, 0))[-2:] == [2, 1]


def test_ralmspec_times_are_those_of_its_rounds():
    # the rounds here take .2 a candidate and 1 a verification, as OWN says
    rounds = lengths_only(1, 1, 0, 0, 0)
    assert play("ralmspec", rounds) == play(f"ralmspec:{OWN}", rounds)
    # a verification as short as a step: match rate .6: (1-.36) * 1.2 < .4 * ... : .64 * .4 = .256 >= .4 * .6 = .24: 2;
    # (1-.216) * .6 = .470 < .64 * .8 = .512
    assert play("ralmspec:step=0.2,verify=0.2", lengths_only(1, 0)) == [1, 2]


def test_ralmspec_overlap_needs_no_stride_where_verification_is_short():
    assert play("ralmspec:overlap=1,step=0.2,verify=0.2", lengths_only(1, 1, 1, 1)) == [1, 1, 1, 1]
    # time(s) = .6^s((s-1).2 + 1) + (1 - .6^s)(.2 s + 1): time(1) = .6 + .4*1.2 = 1.08;
    # time(2) = .36*1.2 + .64*1.4 = 1.328: .64*1.08 = .691 >= .4*1.328 = .531;
    # time(3) = .216*1.4 + .784*1.6 = 1.5568: .784*1.328 = 1.041 >= .64*1.5568 = .996;
    # time(4) = .1296*1.6 + .8704*1.8 = 1.7741: .8704*1.5568 = 1.355 < .784*1.7741 = 1.391: 3
    assert play(f"ralmspec:overlap=1,{OWN}", lengths_only(1, 1)) == [1, 3]


# --- Bandits


def test_the_logarithm_is_carried_along():
    log = 0.0
    for rounds in range(200):
        log = next_log(log, float(rounds))
        assert log == pytest.approx(math.log(rounds + 1), abs=1e-14)


def test_banditspec_plays_in_turn_for_seven_rounds():
    assert play("banditspec", lengths_only(*[0] * 7)) == [1, 2, 3, 4, 1, 2, 3]


def test_banditspec_by_upper_confidence_and_as_released():
    # arms 1, 2: rewards 2/1.2 = 1.667 and 1/1.4 = .714; equal pulls: arm 1. Its third reward 1/1.2: mean 1.25 of 2.
    # ln 3 = 1.0986: 1.25 + sqrt(6 * 1.0986 / 2) = 3.065 < .714 + sqrt(6 * 1.0986) = 3.282: arm 2.
    rounds = lengths_only(1, 0, 0, 0)
    assert play("banditspec:lengths=1/2,warmup=2", rounds) == [1, 2, 1, 2]
    # all pulls in the divisor: 1.25 > .714: arm 1
    assert play("banditspec:lengths=1/2,warmup=2,released=1", rounds) == [1, 2, 1, 1]
    # UCB1 proper, w = 2: 1.25 + 1.048 = 2.298 > .714 + 1.482 = 2.197
    assert play("banditspec:lengths=1/2,warmup=2,width=2", rounds) == [1, 2, 1, 1]


def test_tapout_tries_each_arm_once():
    nothing = {"top_prob": math.nan, "entropy": math.nan}

    def candidates(*pairs):
        return [{"top_prob": top, "entropy": entropy} for top, entropy in pairs]

    # max q < .6 | sqrt(.15 H) > .3 iff H > .6 | 1 - sqrt(.2 H) < .4 iff H > 1.8 | sqrt(H) up by > .2
    rounds = [
        (candidates((0.7, 9.0), (0.59, 0.0)), 0),
        (candidates((0.1, 0.5), (0.1, 0.61)), 0),
        (candidates((0.1, 0.61), (0.1, 1.79), (0.9, 1.81)), 0),
        (candidates((0.1, 9.0), (0.1, 4.0), (0.1, 4.5), (0.1, 5.7)), 0),  # roots 3, 2, 2.121, 2.387
    ]
    assert play("tapout", rounds, **nothing) == [2, 2, 3, 4]
    # rewards: all of 2 (2/16/2 + 1/2 = .5625) for the second arm, else 0: it is played again
    again = [(candidates((0.1, 0.5), (0.1, 0.5), (0.1, 0.7)), 0)]
    rounds[1] = (rounds[1][0], 2)
    assert play("tapout", [*rounds, *again], **nothing)[-1] == 3


def test_tapout_keeps_to_its_longest():
    rounds = [([{"top_prob": 1.0, "entropy": 0.0}] * 3, 0)]
    assert play("tapout:most=3", rounds, top_prob=math.nan, entropy=math.nan) == [3]


# --- Tuned on the way


def test_selftuned_starts_from_plain_decoding_and_follows_its_throughput():
    # acceptance .5: S = 1, .5, .25, .125. rho = 1: on iff S / 2 >= .2: stops at .25 * .5: 2 candidates.
    # emitted 3 in 1.4, with the plain token 4 / 2.4 = 1.667: on iff S / 2 >= .333: 1.
    # emitted 1 more in 1.2: 5 / 3.6 = 1.389: .278 > .25: 1; 1 more: 6 / 4.8 = 1.25: .25: 2 (a tie goes on)
    always = {"next_accept_prob": 0.5, "verify_time": 1.0, "step_time": 0.2}
    rounds = [([{"survival": 0.5**i} for i in range(1, 5)], m) for m in (2, 0, 0, 0)]
    assert play("selftuned", rounds, survival=1.0, **always) == [2, 1, 1, 2]


def test_hf_auto_threshold_is_the_best_tenth():
    # .95, .85 accepted, .35 rejected: three samples of both kinds. Thresholds .4 to .8 have no error: the greatest.
    rounds = shows("draft_prob", [0.95, 0.85, 0.35], [0.9, 0.79])
    rounds[0] = (rounds[0][0], 2)
    assert play("hf_auto:warmup=2", rounds, draft_prob=math.nan) == [3, 2]
    # with the default of more than 5 samples it is still .4
    rounds = shows("draft_prob", [0.95, 0.85, 0.35], [0.9, 0.79, 0.41, 0.3])
    assert play("hf_auto", rounds, draft_prob=math.nan) == [3, 4]


def test_hf_auto_weighs_a_lost_match_three_times():
    rule = parse("hf_auto:warmup=0").policy
    none, empty = (-1.0,) * 20, (0.0,) * 10
    # matches at tenths 2, 8, 8, 8, 8; misses at 3, 5: from .3 on one match in five is lost (3 * .2 = .6) and false
    # alarms are 2/2 up to .3, 1/2 up to .5, 0 above: .6 at .6 to .8 against 1 at .2: .8
    matched, missed = list(empty), list(empty)
    matched[2], matched[8], missed[3], missed[5] = 1.0, 4.0, 1.0, 1.0
    state = (0.4, none, tuple(matched), tuple(missed))
    assert rule.end_round(state, Outcome(0, 0))[0] == pytest.approx(0.8)
    # two of five lost: 1.2 against 1: .2, the greatest threshold that loses none
    matched[2], matched[8] = 2.0, 3.0
    assert rule.end_round((0.4, none, tuple(matched), tuple(missed)), Outcome(0, 0))[0] == pytest.approx(0.2)
    # one kind only: as it was
    assert rule.end_round((0.4, none, tuple(matched), empty), Outcome(0, 0))[0] == pytest.approx(0.4)


def test_hf_auto_does_not_remember_a_candidate_of_the_round_before():
    rule = parse("hf_auto").policy
    state = rule.init()
    for k, prob in enumerate([math.nan, 0.95, 0.85]):
        state, _ = rule.stop(state, Observation(k, draft_prob=prob))
    assert state[1][:3] == (9.0, 8.0, -1.0)
    # the world may end the next round after a candidate that the rule is not asked about
    state, _ = rule.stop(state, Observation(0, draft_prob=math.nan))
    assert set(state[1]) == {-1.0}


def test_hf_auto_learns_from_what_was_tested_alone():
    rule = parse("hf_auto:warmup=0").policy
    state = (0.4, (9.0, 8.0, 3.0, 1.0, *(-1.0,) * 16), (0.0,) * 10, (0.0,) * 10)
    _, _, matched, missed = rule.end_round(state, Outcome(4, 1))
    assert [b for b, n in enumerate(matched) if n] == [9] and [b for b, n in enumerate(missed) if n] == [8]
    _, _, matched, missed = rule.end_round(state, Outcome(2, 2))
    assert [b for b, n in enumerate(matched) if n] == [8, 9] and not any(missed)
