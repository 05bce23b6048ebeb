"""Who is drawn: identities as the pipeline makes and takes them."""

import dataclasses
from typing import Any

from infinite_id_jax.errors import InputError
from infinite_id_jax.faces.extract import ExtractedFace
from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Identity:
    """One person (or a mixture) as identity tokens c_id [K, D], and nobody as as many; `face` if of a photo."""

    tokens: Float[Array, "K D"]
    unconditional: Float[Array, "K D"]  # for guidance (decision 11)
    face: ExtractedFace | None = None


def checked_people(identities: Any, style_merge: str = "none") -> list[Identity]:
    """One identity, several or none as a list. Raises InputError for anything else, and where AdaIN has no meaning."""
    people: list[Any] = list(identities or ()) if isinstance(identities, list | tuple | None) else [identities]
    for person in people:
        if not isinstance(person, Identity):
            raise InputError(f"A {type(person).__name__} is no identity: make one of it with encode_identity.")
    counts = {len(person.tokens) for person in people}
    if style_merge != "none" and 1 in counts:
        raise InputError(
            f"style_merge {style_merge} shifts the mean of an identity's tokens, and of a single one nothing would be "
            "left: take style_merge none, or an adapter of several tokens."
        )
    if style_merge == "adain" and len(counts) > 1:
        raise InputError(
            "style_merge adain divides by the deviation over an identity's tokens, which differ in number here "
            f"({', '.join(map(str, sorted(counts)))}): draw them apart, or take adain_mean."
        )
    return people
