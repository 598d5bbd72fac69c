"""The claims of arXiv 2605.20555 about the untrained pair, mixed by both schemes at every alpha: section 5, table 4.

Shape legend: A alphas, C conditions, R resamples, S seeds, N problems.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from logitmix.evaluation.statistics import bootstrap_rates, paired_difference
from logitmix.paper.outcomes import Outcomes
from logitmix.paper.verdicts import Finding, above

Scores = NDArray[np.float64]


def logits_need_a_smaller_weight(o: Outcomes) -> Finding:
    finding = _alpha_claim(
        o,
        "Logit mixing keeps the format at a smaller weight of the anchor",
        "section 5, (i); table 4",
        "format 80 % at alpha 0.4 by logits, 75 % at 0.5 by probabilities",
        "alpha at which the format rate reaches half of its largest (between grid points on a line), probability - "
        "logit; above 0",
        lambda alphas, logit, prob: _half_maximum(alphas, prob) - _half_maximum(alphas, logit),
        key="format_ok",
    )
    formats = {
        a: [float(o.sweep_scores(s, a, "format_ok").mean()) for s in ("logit", "prob")] for a in o.alphas("logit")
    }
    alpha = max(formats, key=lambda a: abs(formats[a][0] - formats[a][1]))
    logit, prob = formats[alpha]
    return replace(finding, rates={f"format at alpha {alpha:g}, logit": logit, "probability": prob})


def logits_peak_higher(o: Outcomes) -> Finding:
    (logit, at), (prob, at_prob) = scores_at_best_alpha(o, "logit"), scores_at_best_alpha(o, "prob")
    estimate = paired_difference(logit, prob)
    return Finding(
        "The untrained pair peaks higher by logits than by probabilities",
        "section 5, (ii); table 4",
        "55.6 and 50.6 %",
        "answer-correct at the best alpha (chosen on one half of the problems, read on the other), logit - "
        "probability; above 0",
        estimate,
        above(estimate) if min(logit.max(), prob.max()) > 0 else "undecided",
        rates={f"logit at alpha {at}": float(logit.mean()), f"probability at alpha {at_prob}": float(prob.mean())},
    )


def both_peaks_exceed_the_anchor(o: Outcomes) -> Finding:
    sft = o.sweep_scores("logit", 1.0)
    peaks = {
        name: scores_at_best_alpha(o, scheme)[0] for name, scheme in (("logit", "logit"), ("probability", "prob"))
    }
    estimate = min((paired_difference(peak, sft) for peak in peaks.values()), key=lambda e: (e.value, e.low))
    return Finding(
        "Both schemes' best exceeds the SFT model alone",
        "section 5, (ii); table 4",
        "55.6 and 50.6 against 39.8 %",
        "answer-correct at the best alpha (chosen on one half of the problems, read on the other) - at alpha 1, of "
        "the scheme that has less; above 0",
        estimate,
        above(estimate),
        rates={name: float(peak.mean()) for name, peak in peaks.items()} | {"SFT alone": float(sft.mean())},
    )


def logits_peak_at_a_smaller_alpha(o: Outcomes) -> Finding:
    return _alpha_claim(
        o,
        "Logit mixing peaks at a smaller alpha than probability mixing",
        "section 5, (iii); table 4",
        "0.5 and 0.6",
        "alpha of the largest answer rate, probability - logit; above 0",
        lambda alphas, logit, prob: alphas[prob.argmax(axis=0)] - alphas[logit.argmax(axis=0)],
    )


def probabilities_peak_where_the_anchor_dominates(o: Outcomes) -> Finding:
    return _alpha_claim(
        o,
        "Probability mixing is best only where the anchor dominates",
        "section 5, (iii); table 4",
        "at 0.6",
        "alpha of its largest answer rate; above 0.5",
        lambda alphas, logit, prob: alphas[prob.argmax(axis=0)],
        bound=0.5,
    )


def _alpha_claim(
    o: Outcomes,
    claim: str,
    source: str,
    paper: str,
    measure: str,
    statistic: Callable[[Scores, Scores, Scores], Scores],
    key: str = "answer_ok",
    bound: float = 0.0,
) -> Finding:
    """A claim about the alpha at which a curve has some property.

    `statistic` takes the alphas `[A]` and the rates `[A, R]` of logit and probability mixing, and returns an alpha, or
    a difference of two, for each resample `[R]`.
    """
    alphas = np.array(o.alphas("logit"))
    scores_CSN = np.array([o.sweep_scores(scheme, alpha, key) for scheme in ("logit", "prob") for alpha in alphas])
    half = len(alphas)
    estimate = bootstrap_rates(scores_CSN, lambda rates_CR: statistic(alphas, rates_CR[:half], rates_CR[half:]))
    means = scores_CSN.mean(axis=(1, 2)).reshape(2, half)
    rates = {
        f"{scheme} at alpha {alphas[values.argmax()]:g}": float(values.max())
        for scheme, values in zip(("logit", "probability"), means, strict=True)
    }
    # if a scheme has nothing right at any alpha, its largest rate is at no alpha
    verdict = above(estimate, bound) if min(rates.values()) > 0 else "undecided"
    return Finding(claim, source, paper, measure, estimate, verdict, "alpha", rates)


def scores_at_best_alpha(o: Outcomes, scheme: str) -> tuple[Scores, str]:
    """Scores `[S, N]` of a scheme at its best alpha, and that alpha, or both if the halves below choose differently.

    The largest of many rates is biased upwards. So the even problems are scored at the alpha that is best on the odd
    ones over all seeds, and the odd problems at the alpha that is best on the even ones; ties go to the smaller alpha.
    """
    alphas = o.alphas(scheme)
    scores_ASN = np.array([o.sweep_scores(scheme, alpha) for alpha in alphas])
    best = [int(scores_ASN[:, :, half::2].mean(axis=(1, 2)).argmax()) for half in (1, 0)]
    scores_SN = np.empty_like(scores_ASN[0])
    for half in (0, 1):
        scores_SN[:, half::2] = scores_ASN[best[half], :, half::2]
    return scores_SN, " and ".join(dict.fromkeys(f"{alphas[i]:g}" for i in best))


def _half_maximum(alphas: Scores, rates_CR: Scores) -> Scores:
    """`[R]`: the smallest alpha at which the rates `[A, R]` reach half of their maximum, interpolated linearly."""
    reached_CR = rates_CR >= rates_CR.max(axis=0) / 2
    i = reached_CR.argmax(axis=0)
    before = np.maximum(i - 1, 0)
    columns = np.arange(rates_CR.shape[1])
    low, high = rates_CR[before, columns], rates_CR[i, columns]
    share = np.divide(rates_CR.max(axis=0) / 2 - low, high - low, out=np.ones_like(low), where=high > low)
    return np.where(i == 0, alphas[0], alphas[before] + share * (alphas[i] - alphas[before]))
