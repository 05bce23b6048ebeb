"""What is said of a study: metrics.json, images.csv and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_jax.evaluation import metrics, tables
from infinite_id_jax.evaluation.judged import Results
from infinite_id_jax.evaluation.metrics import Estimate
from infinite_id_jax.evaluation.study import StudyConfig

_IDENTITY, _PROMPTED = "identity_", "prompted_"


def write_results(study: StudyConfig, results: Results, folder: Path) -> list[Path]:
    """Write metrics.json, images.csv and report.html; their paths."""
    from infinite_id_jax.evaluation.report import write_report
    from infinite_id_jax.evaluation.study_report import report_of

    rows = tables.with_zero_for_no_face(results.rows)
    content = summarise(study, results, rows)
    tables.write_csv(rows, folder / "images.csv")
    tables.write_metrics(content, folder / "metrics.json")
    report = write_report(folder, report_of(study, results, rows, content, folder))
    return [folder / "metrics.json", folder / "images.csv", report]


def summarise(study: StudyConfig, results: Results, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of metrics.json."""
    table = tables.methods_table(rows)
    for name, found in face_sets(results, rows).items():
        table[name] |= found
    claims = [
        tables.claim_entry(
            rows,
            text=claim.text,
            metric=claim.metric,
            first=claim.first,
            second=claim.second,
            expected=claim.expected,
            bound=claim.bound,
            prompts=claim.prompts,
        )
        for claim in study.claims
        if tables.shared_prompts(rows, claim.first, claim.second, claim.prompts)
    ]
    return {
        "methods": table,
        "claims": claims,
        "baselines": baselines(results),
        "base": base_table(results),
        "interpolation": interpolation_table(results),
        "settings": {
            "identities": len(results.people),
            "prompts": len(results.prompts),
            "sampling": dict(study.sampling),
            "group": study.group,
        },
    }


def face_sets(results: Results, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Estimate]]:
    """Of each method's faces: distance from real photographs as a set (KID, FID), and how much they differ (LPIPS).

    The features are the judging recogniser's last map, each place's channels of unit length; the names say so.
    """
    real, found = results.others.features[results.others.found], {}
    names = np.array([person.name for person in results.people])
    whose = np.repeat(names, len(results.others.found) // len(names))[results.others.found]
    for method, features in results.features.items():
        own = [row for row in rows if row["method"] == method]
        photos = np.array([row["style"] == "photo" and bool(row["found"]) for row in own])
        identities = np.array([row["identity"] for row in own])[photos]
        if _too_few(identities) or _too_few(whose):
            continue
        seen = features[photos]
        spread = metrics.diversity(seen, identities)
        found[method] = {"lpips_judge_diversity": metrics.interval(spread.values, spread.identities)}
        found[method]["kid_judge"] = metrics.kid_interval(seen, identities, real, whose)
        fid = metrics.frechet_distance(_principal(seen, real), _principal(real, real))
        found[method]["fid_judge_64d"] = Estimate(fid, float("nan"), float("nan"))
    return found


def _too_few(identities: np.ndarray) -> bool:
    """Whether, without one of the people, no two pictures are left: an interval of KID leaves each out in turn."""
    counts = np.unique(identities, return_counts=True)[1]
    return int(counts.sum() - counts.max(initial=0)) < 2


def _principal(features: np.ndarray, of: np.ndarray, count: int = 64) -> np.ndarray:
    """The first principal components of `of`: a covariance of more numbers than pictures would be singular."""
    centred = of - of.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return (features - of.mean(axis=0)) @ axes[:count].T


def baselines(results: Results) -> dict[str, Any]:
    """What scores are worth: the same between two photos of one person, and of two; guessing; the judges themselves."""
    photos, others = results.photos, results.others
    count = len(others.found) // len(results.people)
    names = np.array([person.name for person in results.people])
    same, different = {}, {}
    for name in ("face", "clip_face"):
        ours, theirs = getattr(photos, name), getattr(others, name)
        genuine = metrics.cosine(np.repeat(ours, count, axis=0), theirs)
        same[name] = metrics.interval(genuine, np.repeat(names, count))
        cosines = metrics.pairwise_cosine(ours, ours)[np.triu_indices(len(names), k=1)]
        different[name] = cosines[~np.isnan(cosines)]
    rank = np.argmax(np.nan_to_num(metrics.pairwise_cosine(others.face, photos.face), nan=-1.0), axis=1)
    right = (rank == np.repeat(np.arange(len(names)), count)).astype(np.float64)
    return {
        "m_face_genuine": same["face"],
        "m_face_impostor_mean": float(different["face"].mean()) if len(different["face"]) else float("nan"),
        "m_face_impostor_95": metrics.impostor_bar(different["face"]) if len(different["face"]) else float("nan"),
        "clip_i_genuine": same["clip_face"],
        "clip_i_impostor_mean": float(different["clip_face"].mean()) if len(different["clip_face"]) else float("nan"),
        "judge_rank_1": metrics.interval(right, np.repeat(names, count)),
        "detection_rate_photos": float(others.found.mean()),
        "judges": results.judges,
        "chance": results.chance,
        "half_way": {
            name: metrics.half_way(results.chance[name.removeprefix(_IDENTITY)], accuracy)
            for name, accuracy in results.judges.items()
            if name.startswith(_IDENTITY)
        },
    }


def base_table(results: Results) -> dict[str, Any]:
    """Accuracy of the attributes that the base was asked for, alone."""
    columns = dict.fromkeys(name for row in results.base for name in row if name.startswith(_PROMPTED))
    table = {}
    for name in columns:
        values = np.array([row[name] for row in results.base if row.get(name) is not None], np.float64)
        table[name] = metrics.interval(values, np.arange(len(values)))
    every = [value for row in results.base for name, value in row.items() if name.startswith(_PROMPTED)]
    return {"mean": float(np.mean(every)) if every else None, "least": _least(table), "attributes": table}


def _least(table: Mapping[str, Estimate]) -> list[Any] | None:
    if not table:
        return None
    name = min(table, key=lambda key: table[key].value)
    return [name, table[name].value]


def interpolation_table(results: Results) -> dict[str, Any]:
    """Similarity to both ends by weight, and how often a step goes the right way."""
    if not results.steps:
        return {}
    weights = sorted({row["weight"] for row in results.steps})
    ways = {(row["first"], row["prompt"]) for row in results.steps}
    lines = {"to_first": [], "to_second": []}
    for way in sorted(ways):
        own = sorted((row for row in results.steps if (row["first"], row["prompt"]) == way), key=lambda r: r["weight"])
        for name, line in lines.items():
            line.append([np.nan if row[name] is None else row[name] for row in own])
    people = np.array([first for first, _ in sorted(ways)])
    second, first = np.array(lines["to_second"]), np.array(lines["to_first"])
    return {
        "weights": weights,
        "to_first": [metrics.interval(first[:, k], people) for k in range(len(weights))],
        "to_second": [metrics.interval(second[:, k], people) for k in range(len(weights))],
        "monotone_to_second": metrics.monotone_share(second, people),
        "monotone_from_first": metrics.monotone_share(-first, people),
    }
