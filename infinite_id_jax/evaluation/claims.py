"""What was claimed of a study and what was measured: differences between methods, and distances from bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation.metrics import Estimate, Scores, above, difference, interval, verdict
from infinite_id_jax.evaluation.study import BASE, INTERPOLATION, MIXING, Claim, StudyConfig
from infinite_id_jax.evaluation.tables import FIDELITY, Row, as_scores, no_face_zero, of_kind

ONE_RUN = "Each side was trained once: the interval says nothing of how far another training would have come."


def claim_entries(study: StudyConfig, rows: Sequence[Row], content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of "claims"; what the study drew no pictures for is left out.

    content: baselines, base, interpolation and mixing as in metrics.json. Raises InputError for a metric nobody has.
    """
    drawn = [_difference(claim, rows, study) for claim in study.claims if _both(claim, rows)]
    bars = [
        *_identity_bars(study, rows, content["baselines"]),
        *_base_bars(study, content["base"]),
        *_between_bars(content),
    ]
    return drawn + [entry for entry in bars if not np.isnan(entry["difference"][0])]


def _both(claim: Claim, rows: Sequence[Row]) -> set[int]:
    """The prompts that both methods drew."""
    chosen = of_kind(rows, claim.prompts)
    first, second = ({row["prompt"] for row in chosen if row["method"] == name} for name in (claim.first, claim.second))
    return first & second


def _difference(claim: Claim, rows: Sequence[Row], study: StudyConfig) -> dict[str, Any]:
    """Paired over the prompts and the people that both methods have, and the pictures that both were scored on."""
    shared = _both(claim, rows)
    chosen = [row for row in of_kind(rows, claim.prompts) if row["prompt"] in shared]
    a, b = ([row for row in chosen if row["method"] == name] for name in (claim.first, claim.second))
    if not all(any(claim.metric in row for row in side) for side in (a, b)):
        raise InputError(f"{claim.first} and {claim.second} have no {claim.metric}: take a metric of images.csv.")
    entry = _entry(claim, _paired(a, b, claim.metric))
    if claim.metric in FIDELITY:
        entry["no_face_zero"] = list(_paired(a, b, no_face_zero(claim.metric)))
    adapters = {method.name: method.adapter for method in study.methods}
    trained = {adapters[name] for name in (claim.first, claim.second) if name in adapters}
    return {**entry, "note": ONE_RUN} if len(trained) > 1 else entry


def _paired(a: Sequence[Row], b: Sequence[Row], metric: str) -> Estimate:
    scored = [{(row["identity"], row["prompt"]): row for row in side if row.get(metric) is not None} for side in (a, b)]
    both = scored[0].keys() & scored[1].keys()  # a face that one side alone lost would weigh its prompt on the other
    if not both:
        return Estimate(np.nan, np.nan, np.nan)
    first, second = (as_scores([row for key, row in side.items() if key in both]) for side in scored)
    return difference(first, second, metric)


def _entry(claim: Claim, estimate: Estimate) -> dict[str, Any]:
    return {
        "claim": claim.text,
        "metric": claim.metric,
        "first": claim.first,
        "second": claim.second,
        "bound": claim.bound,
        "prompts": claim.prompts,
        "difference": list(estimate),
        "verdict": verdict(estimate, claim.bound),
    }


def _identity_bars(study: StudyConfig, rows: Sequence[Row], baselines: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The first method's similarity above impostors, and each attribute above half-way from guessing to the judge."""
    method = study.methods[0]
    own = [row for row in rows if row["method"] == method.name]
    if not own:
        return []
    second = "m_face_impostor_95"
    claim = Claim(f"{method.title}: M_Face is above that of 95% of pairs of two people", "m_face", method.name, second)
    found = [_similarity_bar(claim, own, baselines[second])]
    bars = {kind: bar for kind, bar in baselines["m_face_cross_impostor_95"].items() if of_kind(own, kind)}
    for kind, bar in bars.items():
        text = f"{method.title} ({kind}): M_Face is above that of 95% of its pictures with photos of others"
        claim = Claim(text, "m_face", method.name, "m_face_cross_impostor_95", prompts=kind)
        found.append(_similarity_bar(claim, of_kind(own, kind), bar))
    scores = as_scores(own)
    for name in study.half_way:
        column, text = (
            f"identity_{name}",
            f"{method.title}: {name.replace('_', ' ')} is right at least half-way to the judge",
        )
        if column in scores.values and column in baselines["half_way"]:
            claim = Claim(text, column, method.name, "half_way")
            found.append(_entry(claim, _above(scores, column, baselines["half_way"][column])))
    return found


def _similarity_bar(claim: Claim, rows: Sequence[Row], bar: float) -> dict[str, Any]:
    scores = as_scores(rows)
    return _entry(claim, _above(scores, "m_face", bar)) | {
        "no_face_zero": list(_above(scores, no_face_zero("m_face"), bar))
    }


def _above(scores: Scores, metric: str, bar: float) -> Estimate:
    return above(interval(scores.values[metric], scores.cluster), bar)


def _base_bars(study: StudyConfig, base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the base alone draws of what it is asked for, in the mean and at its worst."""
    if not base["attributes"]:
        return []
    (mean, each), (name, *least) = study.base_bars, base["least"]
    worst = f"The base alone draws every attribute at {each:.0%}; its worst is {name.partition('_')[2]}"
    claims = [
        (Claim(f"The base alone draws {mean:.0%} of what it is asked for", "prompted", BASE, f"{mean}"),
         above(base["mean"], mean)),
        (Claim(worst, name, BASE, f"{each}"), above(Estimate(*least), each)),
    ]  # fmt: skip
    return [_entry(claim, estimate) for claim, estimate in claims]


def _between_bars(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every step from one person to another, in the mean over pairs, and two people as one against impostors."""
    steps, mixed, found = content["interpolation"], content["mixing"], []
    ways = {"least_step_to_second": "nearer to the second person", "least_step_from_first": "further from the first"}
    for metric, way in ways.items() if steps else ():
        claim = Claim(f"Every step of an interpolation leads {way}", metric, INTERPOLATION, "0", prompts="photo")
        found.append(_entry(claim, steps[metric]))
    for end in ("first", "second") if mixed else ():
        text = f"Two people as one are more like the {end} than like others"
        found.append(_entry(Claim(text, f"lead_{end}", MIXING, "others", prompts="photo"), mixed[f"lead_{end}"]))
        text = f"Two people as one are more like the {end} than 95% of pairs of two people are"
        claim = Claim(text, f"to_{end}", MIXING, "m_face_impostor_95", prompts="photo")
        found.append(_entry(claim, above(mixed[f"to_{end}"], content["baselines"]["m_face_impostor_95"])))
    return found
