"""What is said of a study: metrics.json, images.csv and the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_jax.evaluation import metrics, tables
from infinite_id_jax.evaluation.claims import claim_entries
from infinite_id_jax.evaluation.judged import Results
from infinite_id_jax.evaluation.metrics import Estimate
from infinite_id_jax.evaluation.study import REFERENCE, TEXT_ONLY, StudyConfig

_IDENTITY, _PROMPTED, _DRAWN = "identity_", "prompted_", "drawn_"


def write_results(study: StudyConfig, results: Results, made_of: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write metrics.json, images.csv, report.html and tables.md; their paths.

    made_of: fingerprints of what was measured, which tell one study's figures from another's.
    """
    from infinite_id_jax.evaluation.markdown import write_markdown
    from infinite_id_jax.evaluation.report import write_report
    from infinite_id_jax.evaluation.study_report import report_of

    rows = tables.with_zero_for_no_face(results.rows)
    content = summarise(study, results, rows)
    content["settings"] |= made_of
    tables.write_csv(rows, folder / "images.csv")
    tables.write_metrics(content, folder / "metrics.json")
    report = report_of(study, results, rows, content, folder)
    pages = [write_report(folder, report), write_markdown(folder, report)]
    return [folder / "metrics.json", folder / "images.csv", *pages]


def summarise(study: StudyConfig, results: Results, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of metrics.json."""
    methods, photos, styles = (tables.methods_table(tables.of_kind(rows, kind)) for kind in ("all", "photo", "style"))
    for name, found in face_sets(results, rows, study.group).items():
        methods[name] |= found
        photos[name] |= found
    measured = {
        "baselines": baselines(study, results, rows),
        "base": base_table(results),
        "interpolation": interpolation_table(results),
        "mixing": mixing_table(results),
    }
    return {
        "methods": methods,
        "methods_photo": photos,
        "methods_style": styles,
        "claims": claim_entries(study, rows, measured),
        **measured,
        "settings": {
            "identities": len(results.people),
            "prompts": len(results.prompts),
            "sampling": dict(study.sampling),
            "group": study.group,
            "intervals": "95%, of the bootstrap over groups of people, who share noise; of mixtures over pairs",
            "judges": dict(results.judged_by),
        },
    }


def face_sets(results: Results, rows: Sequence[Mapping[str, Any]], group: int) -> dict[str, dict[str, Estimate]]:
    """Of each method's photographs: distance from real ones as a set (KID, FID), and how much a person's differ.

    The features are the judge's, which the names say: `diversity_judge` is the mean squared distance between two
    pictures of a person, which with the channels of each place of unit length is LPIPS' formula with all weights
    alike, but not its network. They are rows of unit length, so KID takes them times sqrt(d).
    """
    real, found = results.others.features[results.others.found], {}
    whose = np.repeat(np.arange(len(results.people)) // group, len(results.others.found) // len(results.people))
    whose = whose[results.others.found]
    for method, features in results.features.items():
        own = [row for row in rows if row["method"] == method]
        photos = np.array([row["style"] == "photo" and bool(row["found"]) for row in own])
        groups = {row["identity"]: row["group"] for row in own}
        people = np.array([row["identity"] for row in own])[photos]
        once = photos & _distinct(own)
        clusters = np.array([row["group"] for row in own])[once]
        found[method] = _variety(features[photos], results.faces[method][photos], people, groups)
        if _too_few(clusters) or _too_few(whose):
            continue
        seen, scale = features[once], np.sqrt(real.shape[1])
        found[method]["kid_judge"] = metrics.kid_interval(scale * seen, clusters, scale * real, whose)
        if method not in (TEXT_ONLY, REFERENCE):  # whose pictures are fewer: FID grows with that
            fid = metrics.frechet_distance(_principal(seen, real), _principal(real, real))
            found[method]["fid_judge_64d"] = Estimate(fid, float("nan"), float("nan"))
    return {method: each for method, each in found.items() if each}


def _variety(
    features: np.ndarray, faces: np.ndarray, people: np.ndarray, groups: Mapping[str, int]
) -> dict[str, Estimate]:
    """How much the pictures of a person differ, and the same where it is the person still."""
    pairs = {
        "diversity_judge": metrics.diversity(features, people),
        "trusted_diversity_judge": metrics.trusted_diversity(features, faces, people),
    }
    return {
        name: metrics.interval(each.values, np.array([groups[person] for person in each.identities]))
        for name, each in pairs.items()
        if len(each.values)
    }


def _distinct(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Marks one of each picture: a group shares what the text alone draws, all prompts share the given photo."""
    shared = {TEXT_ONLY: ("prompt", "group"), REFERENCE: ("identity",)}
    keys = [tuple(row[name] for name in shared.get(row["method"], ("file",))) for row in rows]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    return np.array([first[key] == i for i, key in enumerate(keys)])


def _too_few(clusters: np.ndarray) -> bool:
    """Whether, without one of them, no two pictures are left: an interval of KID leaves each out in turn."""
    counts = np.unique(clusters, return_counts=True)[1]
    return int(counts.sum() - counts.max(initial=0)) < 2


def _principal(features: np.ndarray, of: np.ndarray, count: int = 64) -> np.ndarray:
    """The first principal components of `of`: a covariance of more numbers than pictures would be singular."""
    centred = of - of.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return (features - of.mean(axis=0)) @ axes[:count].T


def baselines(study: StudyConfig, results: Results, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What scores are worth: the same between two photos of one person, and of two; guessing; the judges themselves.

    No noise is shared here: these intervals are over people.
    """
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
        "m_face_impostor_mean": _mean(different["face"]),
        "m_face_impostor_95": _bar(different["face"]),
        "m_face_cross_impostor_95": _cross_impostors(results, rows, study.methods[0].name),
        "clip_i_genuine": same["clip_face"],
        "clip_i_impostor_mean": _mean(different["clip_face"]),
        "clip_i_impostor_95": _bar(different["clip_face"]),
        "judge_rank_1": metrics.interval(right, np.repeat(names, count)),
        "detection_rate_photos": float(others.found.mean()),
        "judges": results.judges,
        "chance": results.chance,
        "chance_prompted": results.asked,
        "half_way": {
            name: metrics.half_way(results.chance[name.removeprefix(_IDENTITY)], accuracy)
            for name, accuracy in results.judges.items()
            if name.startswith(_IDENTITY)
        },
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _bar(impostors: np.ndarray) -> float:
    return metrics.impostor_bar(impostors) if len(impostors) else float("nan")


def _cross_impostors(results: Results, rows: Sequence[Mapping[str, Any]], method: str) -> dict[str, float]:
    """The bar of a method's own pictures against the given photos of other people, by kind of prompt.

    Pictures of one method are alike in more than who they show: their impostors are nearer than photos are.
    """
    own = [row for row in rows if row["method"] == method]
    if not own:
        return {}
    cosines = metrics.pairwise_cosine(results.faces[method], results.photos.face)
    names = np.array([person.name for person in results.people])
    other = np.array([row["identity"] for row in own])[:, None] != names
    photo = np.array([row["style"] == "photo" for row in own])
    chosen = {"photo": cosines[photo][other[photo]], "style": cosines[~photo][other[~photo]]}
    return {kind: _bar(values[~np.isnan(values)]) for kind, values in chosen.items()}


def base_table(results: Results) -> dict[str, Any]:
    """Accuracy of the attributes that the base was asked for, alone; `mean` is of those that are not the style."""
    columns = dict.fromkeys(name for row in results.base for name in row if name.startswith(_PROMPTED))
    table = {}
    for name in columns:
        values = np.array([row[name] for row in results.base if row.get(name) is not None], np.float64)
        table[name] = metrics.interval(values, np.arange(len(values)))
    content = [name for name in columns if name != tables.STYLE]
    every = [(row[name], i) for i, row in enumerate(results.base) for name in content if row.get(name) is not None]
    values, pictures = np.array(every, np.float64).reshape(-1, 2).T
    return {
        "mean": metrics.interval(values, pictures),
        "least": _least(table),
        "attributes": table,
        "judge": {name: _share(results.base, name.replace(_PROMPTED, _DRAWN)) for name in columns},
        "chance": {name: results.asked_of_base[name.removeprefix(_PROMPTED)] for name in columns},
    }


def _share(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    values = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(values)) if values else float("nan")


def _least(table: Mapping[str, Estimate]) -> list[Any] | None:
    if not table:
        return None
    name = min(table, key=lambda key: table[key].low)  # few pictures ask for some: what may be least is told by its end
    return [name, *table[name]]


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
    pairs = np.array([first for first, _ in sorted(ways)])
    second, first = np.array(lines["to_second"]), np.array(lines["to_first"])
    return {
        "weights": weights,
        "to_first": [metrics.interval(first[:, k], pairs) for k in range(len(weights))],
        "to_second": [metrics.interval(second[:, k], pairs) for k in range(len(weights))],
        "monotone_to_second": metrics.monotone_share(second, pairs),
        "monotone_from_first": metrics.monotone_share(-first, pairs),
        "least_step_to_second": _least_step(second, pairs),
        "least_step_from_first": _least_step(-first, pairs),
    }


def _least_step(similarities: np.ndarray, pairs: np.ndarray) -> Estimate:
    """The mean step that is the least sure to rise: where it does, all do."""
    steps = np.diff(similarities, axis=1).T
    return min((metrics.interval(step, pairs) for step in steps), key=lambda step: step.low)


def mixing_table(results: Results) -> dict[str, Estimate]:
    """Similarity of two people as one to each of them, and how much more than to everybody else on average."""
    if not results.mixtures:
        return {}
    pairs = np.array([row["first"] for row in results.mixtures])
    columns = {
        name: np.array([np.nan if row[name] is None else row[name] for row in results.mixtures], np.float64)
        for name in ("to_first", "to_second", "to_others")
    }
    others = columns.pop("to_others")
    columns |= {name.replace("to_", "lead_"): values - others for name, values in columns.items()}
    return {name: metrics.interval(values, pairs) for name, values in columns.items()}
