"""The miniature's tokenizers: CLIP's byte-pair encoding, with merges that make one token of each word of its world."""

import re
from pathlib import Path

from data_pipeline.avatar_captions import LOOKS, MEDIA, WORDS
from examples.tiny_vocabulary import EOS, WORD_LIST, write_tokenizer
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer

MAX_LENGTH = 64  # tokens of a prompt; no caption has more than 55
_MERGES = 894  # at least as many as it takes to make every word below one token
SIZE = 2 * 256 + _MERGES + 2  # ids: of bytes, merges, and the two specials


def words() -> list[str]:
    """The world's words, then common ones of prompts."""
    phrases = [text for table in (WORDS, LOOKS) for kind in table.values() for texts in kind.values() for text in texts]
    phrases += [text for texts in MEDIA.values() for text in texts]
    own = re.findall(r"[a-z]+", " ".join(phrases).lower())
    return list(dict.fromkeys([*own, *WORD_LIST.split()]))


def write_tokenizers(folder: Path) -> None:
    """tokenizer/ and tokenizer_2/ of a model folder; the second pads with "!", as SDXL's."""
    for name, pad_token in (("tokenizer", EOS), ("tokenizer_2", "!")):
        write_tokenizer(folder / name, pad_token, words=words(), count=_MERGES, max_length=MAX_LENGTH)


def tokenizer(model: Path) -> CLIPTokenizer:
    """The first of a model folder, both written where they are not yet: words that come later get no ids of others."""
    if not (model / "tokenizer_2").is_dir():
        write_tokenizers(model)
    return CLIPTokenizer.from_folder(model / "tokenizer")
