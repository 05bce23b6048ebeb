"""The README.md of an exported folder: what it is, what it was made of, how it is used, whose licences it carries."""

from collections.abc import Mapping
from typing import Any, NamedTuple

CONSENT = (
    "Only for people who have agreed to it. Images made with it are AI-made and must not be passed off as photographs."
)


class Facts(NamedTuple):
    """What is known of the weights; None is said to be unknown, not left out."""

    what: str  # one sentence
    base_model: str | None = None
    licence: str | None = None
    step: int | None = None
    run: Mapping[str, Any] | None = None  # as training wrote it down
    metrics: Mapping[str, str] | None = None  # the newest of each column
    data: Mapping[str, Any] | None = None  # photos, people, licences, sources


def model_card(facts: Facts, files: Mapping[str, str], usage: str) -> str:
    """Markdown with the header that model hubs read; `files` says of each what it is, `usage` is Markdown."""
    header = ["---", "license: other", "tags: [stable-diffusion-xl, identity-preservation, infinite-id, ip-adapter]"]
    if facts.base_model:
        header.append(f"base_model: {facts.base_model}")
    sections = {
        "Files": _table(files),
        "Use": f"{usage}\n\n{CONSENT}",
        "Training": _training(facts),
        "Data": _data(facts),
        "Metrics": _table(facts.metrics) if facts.metrics else "None were recorded with these weights.",
        "Licence": _licence(facts),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return "\n".join([*header, "---", "", f"# {facts.what}", "", body, ""])


def _training(facts: Facts) -> str:
    if facts.run is None:
        return "How these weights were trained is not recorded in the files they came from."
    return f"{facts.step:,} steps.\n\n{_table(dict(_flat(facts.run)))}"


def _data(facts: Facts) -> str:
    known = dict(facts.data or {})
    if facts.run is not None:
        known |= {"fingerprint of the dataset": facts.run["data"]["dataset"]}
    if facts.data is None:
        known["photos, people and their licences"] = "not given at export (--data names the dataset's folder)"
    return _table(known) if known else "Unknown."


def _licence(facts: Facts) -> str:
    base = facts.base_model or "the base model it was trained over"
    own = f"{facts.licence}. " if facts.licence else ""
    return (
        f"{own}These weights work on {base} and inherit the terms of its licence; they also carry the terms of the "
        "photos they were trained on and of the face recogniser and CLIP whose features they read."
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in tree.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return flat


def _table(rows: Mapping[str, Any]) -> str:
    cells = [(str(key), str(value).replace("|", "\\|").replace("\n", " ")) for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in cells)])
