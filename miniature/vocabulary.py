"""The miniature's tokenizers: CLIP's byte-pair encoding, with merges that make one token of each word of its world."""

import re
from pathlib import Path

from data_pipeline.avatar_captions import LOOKS, MEDIA, WORDS
from examples.tiny_vocabulary import EOS, WORD_LIST, write_tokenizer
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer

MAX_LENGTH = 64  # tokens of a prompt; no caption has more than 50
_MERGES = 1500  # more than it takes to make every word below one token
SIZE = 1408  # ids: of bytes, merges, and the two specials


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


def tokenizer(folder: Path) -> CLIPTokenizer:
    """The first of them, written below `folder` where it is not yet."""
    if not (folder / "tokenizer").is_dir():
        write_tokenizers(folder)
    return CLIPTokenizer.from_folder(folder / "tokenizer")
