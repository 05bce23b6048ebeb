"""The report of a study: the paper's tables and figures, from what was scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from infinite_id_jax.evaluation import figures, tables
from infinite_id_jax.evaluation.judged import Results
from infinite_id_jax.evaluation.metrics import Estimate
from infinite_id_jax.evaluation.report import Block, Cell, Claims, Figure, ImageGrid, Report, Section, Table
from infinite_id_jax.evaluation.study import DRAWN, REFERENCE, TEXT_ONLY, StudyConfig

_BOUNDS = {
    TEXT_ONLY: "the text alone",
    REFERENCE: "the given photo itself",
    DRAWN: "drawn by the world itself",
}
_COLUMNS = {
    "clip_t": "CLIP-T",
    "clip_i": "CLIP-I (faces)",
    "m_face": "M_Face",
    tables.no_face_zero("m_face"): "M_Face, no face = 0",
    "rank_1": "rank 1",
    "photo_face": "photos with a face",
    "found": "faces found",
    "prompted": "prompted attributes",
    "identity_attributes": "identity attributes",
    tables.STYLE: "style",
    "diversity_judge": "diversity (judge's features)",
    "trusted_diversity_judge": "trusted diversity (the same)",
    "kid_judge": "KID (the same)",
    "fid_judge_64d": "FID (64 components)",
}
_SHOWN = 4  # people in the grids
_NOTHING = Estimate(float("nan"), float("nan"), float("nan"))
Rows = Sequence[Mapping[str, Any]]


def report_of(study: StudyConfig, results: Results, rows: Rows, content: Mapping[str, Any], folder: Path) -> Report:
    """All sections that the study has pictures for."""
    titles = {method.name: method.title for method in study.methods} | _BOUNDS
    sections = [
        Section("What the paper claims", _CLAIMS, _claims(content["claims"])),
        Section("All methods", _methods_text(results), _all_methods(study, content, titles)),
        Section("What the scores are worth", _BASELINES, _baselines(content)),
        Section("The base alone", _BASE, [_base(content)]),
        *_comparison(study, rows, titles),
        *_resolution(study, rows),
        *_interpolation(results, content, folder),
        *_mixing(results, content, folder),
        Section("Pictures", _PICTURES, [_grid(name, results, rows, titles, folder) for name in _drawn(study, rows)]),
        *_styles(study, results, rows, titles, folder),
    ]
    verdicts = [claim["verdict"] for claim in content["claims"]]
    counted = ", ".join(f"{verdicts.count(each)} {each}" for each in ("confirmed", "not confirmed", "contradicted"))
    count = f"{len(results.people)} people x {len(results.prompts)} prompts"
    summary = f"{count}, {len(titles)} methods. Of {len(verdicts)} claims: {counted}."
    return Report("The method, measured", summary, sections, content["settings"])


_CLAIMS = (
    "Each difference is paired over people. People of one group share noise, so an interval comes of drawing groups "
    "anew, the same for both sides; of interpolations and mixtures, pairs; of the base alone, pictures. A bar is taken "
    "as known, and the prompts are those of this study: an interval says nothing of others. A claim is confirmed where "
    "the whole 95% interval lies on its side of the bound, contradicted where on the other."
)
_METHODS = (
    "Means over pictures with 95% intervals over groups of people who share noise. M_Face and CLIP-I are cosines with "
    "the given photo; rank 1 is the share of pictures nearer to the right photo than to anybody else's (a picture "
    "without a face counts as wrong); prompted attributes are the share of what a prompt says beside its style that a "
    "judge sees in the picture, identity attributes that of what the person looks like. Where no face was found in a "
    "photo made smaller, nobody is drawn in its place. Across styles CLIP-I says little of who it is. Diversity, "
    "KID and FID are of photographs, over features of the judging recogniser, so comparable here only. Judges: "
)
_BASELINES = (
    "Two photos of one person, two people, guessing, and the judges on pictures that show for certain what is asked."
)
_BASE = "Prompts that say every attribute, in all styles, without any identity."
_PICTURES = "The first people of the study; below each picture its M_Face and the share of prompted attributes."


def _claims(claims: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Those that share a note under it."""
    notes = list(dict.fromkeys(claim.get("note", "") for claim in claims))
    return [Claims([claim for claim in claims if claim.get("note", "") == note], note) for note in notes]


def _methods_text(results: Results) -> str:
    return _METHODS + "; ".join(f"{name}: {judge}" for name, judge in results.judged_by.items()) + "."


def _all_methods(study: StudyConfig, content: Mapping[str, Any], titles: Mapping[str, str]) -> list[Block]:
    """Those that drew photographs and other styles together; each kind by itself."""
    partial = {method.name for method in study.methods if method.photo is None or method.style is None}
    whole = {name: metrics for name, metrics in content["methods"].items() if name not in partial}
    parts = {
        "All prompts, of methods that drew them all.": whole,
        "Photographs alone.": content["methods_photo"],
        "Other styles alone.": content["methods_style"],
    }
    return [_methods(methods, titles, note) for note, methods in parts.items() if methods]


def _methods(methods: Mapping[str, Mapping[str, Estimate]], titles: Mapping[str, str], note: str) -> Table:
    columns = [name for name in _COLUMNS if any(name in metrics for metrics in methods.values())]
    rows = [
        [titles.get(name, name), *(metrics.get(column, "") for column in columns)] for name, metrics in methods.items()
    ]
    return Table(["Method", *(_COLUMNS[name] for name in columns)], rows, note)


def _baselines(content: Mapping[str, Any]) -> list[Block]:
    found, first = content["baselines"], next(iter(content["methods"]))
    single = [
        ["M_Face, two photos of one person", found["m_face_genuine"]],
        ["M_Face, two people", found["m_face_impostor_mean"]],
        ["M_Face, 95% of pairs of two people are below", found["m_face_impostor_95"]],
        *(
            [f"M_Face, 95% of pairs of a picture of {first} ({kind}) and another's photo are below", bar]
            for kind, bar in found["m_face_cross_impostor_95"].items()
        ),
        ["CLIP-I, two photos of one person", found["clip_i_genuine"]],
        ["CLIP-I, two people", found["clip_i_impostor_mean"]],
        ["CLIP-I, 95% of pairs of two people are below", found["clip_i_impostor_95"]],
        ["Rank 1 of the judge among these people", found["judge_rank_1"]],
        ["Faces found in photos", found["detection_rate_photos"]],
    ]
    guessing = {"prompted": found["chance_prompted"], "identity": found["chance"]}
    attributes = [
        [
            name.replace("_", " ", 1),
            guessing[name.partition("_")[0]][name.partition("_")[2]],
            accuracy,
            *(content["methods"].get(method, {}).get(name, "") for method in (first, TEXT_ONLY)),
            _half(found, name),
        ]
        for name, accuracy in sorted(found["judges"].items())
    ]
    header = ["Attribute", "guessing", "judge on drawn pictures", first, TEXT_ONLY, "half-way"]
    return [Table(["Baseline", "Value"], single), Table(header, attributes)]


def _half(found: Mapping[str, Any], name: str) -> float | str:
    return found["half_way"].get(name, "")


def _base(content: Mapping[str, Any]) -> Table:
    base = content["base"]
    rows = [
        [column.partition("_")[2], estimate, base["judge"][column], base["chance"][column]]
        for column, estimate in base["attributes"].items()
    ]
    header = ["Prompted attribute", "accuracy", "judge on drawn pictures", "guessing"]
    return Table(header, [["mean", base["mean"], "", ""], *rows] if rows else [])


def _drawn(study: StudyConfig, rows: Rows) -> list[str]:
    there = {row["method"] for row in rows}
    return [method.name for method in study.methods if method.name in there and method.shrink == 1]


def _comparison(study: StudyConfig, rows: Rows, titles: Mapping[str, str]) -> list[Section]:
    photographs = tables.of_kind(rows, "photo")  # across styles CLIP-I says little of who it is
    whole = [m.name for m in study.methods if m.photo is not None and m.shrink == 1]
    there = [
        name
        for name in whole
        if all(
            any(row["method"] == name and row[metric] is not None for row in photographs) for metric in tables.FIDELITY
        )
    ]
    if len(there) < 2:
        return []
    points = {titles[name]: point for name, point in tables.fidelity_and_semantics(photographs, there).items()}
    drawn = figures.scatter(points, x_label="CLIP-T", y_label="mean z-score of M_Face and CLIP-I")
    figure = Figure("Methods by consistency with the text and fidelity of the identity", drawn)
    return [
        Section("Identity against semantics", "As Fig. 9, of photographs: to the right and up is better.", [figure])
    ]


def _resolution(study: StudyConfig, rows: Rows) -> list[Section]:
    methods = tables.methods_table([row for row in rows if row["style"] == "photo"])  # which is what shrunk ones draw
    shrunk = [method for method in study.methods if method.shrink > 1 and method.name in methods]
    if not shrunk:
        return []
    whole = [m for m in study.methods if m.shrink == 1 and m.adapter == shrunk[0].adapter and m.name in methods][:1]
    lines = {
        _COLUMNS[metric]: [methods[method.name].get(metric, _NOTHING) for method in whole + shrunk]
        for metric in ("m_face", "clip_i", "clip_t")
    }
    labels = ["whole" if method.shrink == 1 else f"1/{method.shrink}" for method in whole + shrunk]
    figure = figures.curve(labels, lines, x_label="side of the given photo", y_label="score")
    return [Section("Smaller photos", "As Fig. 11.", [Figure("Scores by the size of the given photo", figure)])]


def _interpolation(results: Results, content: Mapping[str, Any], folder: Path) -> list[Section]:
    found = content["interpolation"]
    if not found:
        return []
    labels = [f"{weight:g}" for weight in found["weights"]]
    lines = {"to the first person": found["to_first"], "to the second": found["to_second"]}
    bars = {"two people": content["baselines"]["m_face_impostor_mean"]}
    figure = figures.curve(labels, lines, x_label="weight of the second person", y_label="M_Face", baselines=bars)
    ways = list(dict.fromkeys((row["first"], row["second"], row["prompt"]) for row in results.steps))[:_SHOWN]
    strips = [
        (
            f"{first} to {second}",
            [Cell(folder / row["file"]) for row in results.steps if (row["first"], row["prompt"]) == (first, prompt)],
        )
        for first, second, prompt in ways
    ]
    right, away = found["monotone_to_second"], found["monotone_from_first"]
    text = (
        f"As Fig. 14, c_id of two people interpolated. {right.value:.0%} of steps move nearer to the second person "
        f"[{right.low:.0%}, {right.high:.0%}], {away.value:.0%} further from the first; chance is 50%."
    )
    blocks: list[Block] = [Figure("Similarity to both people by weight", figure), ImageGrid(labels, strips)]
    return [Section("From one person to another", text, blocks)]


def _mixing(results: Results, content: Mapping[str, Any], folder: Path) -> list[Section]:
    if not results.mixtures:
        return []
    photos = {person.name: person.photo for person in results.people}
    rows = [
        (
            results.prompts[row["prompt"]].text,
            [
                Cell(Image.fromarray(photos[row["first"]])),
                Cell(folder / row["file"]),
                Cell(Image.fromarray(photos[row["second"]])),
            ],
        )
        for row in results.mixtures[: 2 * _SHOWN]
    ]
    found, bars = content["mixing"], content["baselines"]
    table = Table(
        ["M_Face", "Value"],
        [
            ["to the first person", found["to_first"]],
            ["to the second", found["to_second"]],
            ["of two people", bars["m_face_impostor_mean"]],
            ["95% of pairs of two people are below", bars["m_face_impostor_95"]],
        ],
    )
    return [Section("Two people as one", "As Fig. 13.", [table, ImageGrid(["one", "both", "the other"], rows)])]


def _grid(method: str, results: Results, rows: Rows, titles: Mapping[str, str], folder: Path) -> ImageGrid:
    own = {(row["prompt"], row["identity"]): row for row in rows if row["method"] == method}
    people = results.people[:_SHOWN]
    lines = [("the given photo", [Cell(Image.fromarray(person.photo)) for person in people])]
    for p, prompt in enumerate(results.prompts):
        if (p, people[0].name) in own:
            lines.append((prompt.text, [_cell(own[p, person.name], folder) for person in people]))
    return ImageGrid([person.name for person in people], lines, titles[method])


def _cell(row: Mapping[str, Any], folder: Path) -> Cell:
    face = "no face" if row["m_face"] is None else f"face {row['m_face']:.2f}"
    return Cell(folder / row["file"], [face, "" if row["prompted"] is None else f"text {row['prompted']:.0%}"])


def _styles(study: StudyConfig, results: Results, rows: Rows, titles: Mapping[str, str], folder: Path) -> list[Section]:
    """Fig. 7: one person in each style, by each way of merging it."""
    there = {row["method"] for row in rows}
    names = [m.name for m in study.methods if m.style is not None and (m.photo is None or m is study.methods[0])]
    names = [name for name in names if name in there]
    if len(names) < 2:
        return []
    person = results.people[0].name
    own = {(row["method"], row["prompt"]): row for row in rows if row["identity"] == person}
    lines = [
        (prompt.text, [_cell(own[name, p], folder) for name in names])
        for p, prompt in enumerate(results.prompts)
        if prompt.style != "photo"
    ]
    return [Section("Styles", "As Fig. 7.", [ImageGrid([titles[name] for name in names], lines)])]
