"""CLIP's byte-pair tokenizer, from the vocabulary files of a model folder or from CLIP's own."""

import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.config import read_json
from infinite_id_jax.typing import Int

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
CONTEXT_LENGTH = 77  # every CLIP text encoder's, where the files do not say

# openai/CLIP's merges (MIT, see NOTICE), of which the first 48,894 make its vocabulary of 49,408 tokens.
MERGES = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
MERGE_COUNT = 49152 - 256 - 2

# openai/CLIP, simple_tokenizer.py: specials, English contractions, runs of letters, single digits, other symbols.
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
WORD_CHARACTER = re.compile(r"[\w'\u2019-]")  # for the user's eye: "don't" and "1080p" are one word
WORD_BEGINNING = re.compile(r"[\w'\u2019-]*\Z")


class CLIPTokenizer:
    """Prompts to token ids [B, max_length]: BOS, the words, EOS, padding; too long a prompt keeps its final EOS."""

    def __init__(self, backend: Tokenizer, *, pad_token: str, max_length: int):
        """Wrap a backend without truncation or padding; raises InputError if a special token is not in it."""
        ids = {token: backend.token_to_id(token) for token in (BOS, EOS, pad_token)}
        if missing := [token for token, token_id in ids.items() if token_id is None]:
            raise InputError(f"The vocabulary lacks {', '.join(missing)}: it is not CLIP's, fetch the files again.")
        self.backend = backend
        self.max_length = max_length
        self.pad_token = pad_token
        self.bos_id, self.eos_id, self.pad_id = ids[BOS], ids[EOS], ids[pad_token]

    @classmethod
    def from_folder(cls, path: str | Path) -> "CLIPTokenizer":
        """Read `vocab.json` and `merges.txt`, or `tokenizer.json`; raises InputError if missing or damaged."""
        folder = Path(path)
        try:
            settings = _settings(folder)
            backend = _backend(*_vocabulary(folder), _added_tokens(settings))
            return cls(backend, pad_token=_content(settings["pad_token"]), max_length=_max_length(settings))
        except InputError as error:
            raise error if str(folder) in str(error) else InputError(f"{folder}: {error}") from None
        except Exception as error:  # the Rust library raises bare Exception for damaged files
            raise InputError(f"{folder} holds no readable CLIP tokenizer ({error}): fetch it again.") from None

    @classmethod
    def of_clip(cls, pad_token: str = EOS) -> "CLIPTokenizer":
        """The tokenizer of every CLIP trained in English; SDXL's second one pads with "!"."""
        lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1 : MERGE_COUNT + 1]
        merges = [(left, right) for left, right in map(str.split, lines)]
        symbols = byte_symbols()
        tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges), BOS, EOS]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # `normalized` as in the files of SDXL.
        flags = {BOS: True, EOS: True} | ({} if pad_token == EOS else {pad_token: False})
        added = [AddedToken(token, special=True, normalized=normalized) for token, normalized in flags.items()]
        return cls(_backend(vocabulary, merges, added), pad_token=pad_token, max_length=CONTEXT_LENGTH)

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B L"]:
        """Token ids as int32 [B, max_length]; raises InputError for text that is not Unicode."""
        rows = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self._encode(text).ids[: self.max_length - 2]
            row[: len(ids) + 2] = [self.bos_id, *ids, self.eos_id]
        return rows

    def cut_words(self, text: str) -> str:
        """The end of the text that does not fit, in the user's own spelling, from the first word not kept whole."""
        cut = self._encode(text).offsets[self.max_length - 2 :]
        if not cut:
            return ""
        start = cut[0][0]
        if WORD_CHARACTER.match(text, start):
            beginning = WORD_BEGINNING.search(text, 0, start)
            start = beginning.start() if beginning else start
        return text[start:].strip()

    def _encode(self, text: str) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError:  # what a shell hands over when the bytes are not UTF-8
            raise InputError(f"The text {text!r} is not valid Unicode: write it in UTF-8.") from None
        return self.backend.encode(text, add_special_tokens=False)


def byte_symbols() -> list[str]:
    """The visible character that stands for each byte in byte-level BPE, in the order of CLIP's ids (GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = 256 - len(visible)  # the other bytes, which take the first characters above them
    return [*map(chr, visible), *map(chr, range(256, 256 + hidden))]


def _backend(vocabulary: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]) -> Tokenizer:
    """Lower case, NFC, single spaces, CLIP's split into words, byte-level BPE with `</w>` at the end of a word."""
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=EOS, end_of_word_suffix="</w>", fuse_unk=False))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.add_tokens(added)
    return backend


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and the merges in order of priority."""
    vocabulary, merges, single = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    if vocabulary.is_file() and merges.is_file():
        return BPE.read_file(str(vocabulary), str(merges))
    if single.is_file():
        model = read_json(single)["model"]
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        return model["vocab"], [(left, right) for left, right in pairs]
    raise InputError(
        f"{folder} holds neither vocab.json with merges.txt nor tokenizer.json: is it a model's tokenizer folder?"
    )


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; where that lists no added tokens, the files that older and newer folders keep them in."""
    settings: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    config, specials, single = (
        folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "tokenizer")
    )
    if config.is_file():
        settings |= read_json(config)
    if "added_tokens_decoder" not in settings:
        if specials.is_file():
            settings |= read_json(specials)
        if single.is_file():
            settings["added_tokens_decoder"] = {token["id"]: token for token in read_json(single)["added_tokens"]}
    return settings


def _max_length(settings: dict[str, Any]) -> int:
    length = settings.get("model_max_length", CONTEXT_LENGTH)
    if not isinstance(length, int | float) or length < 3:
        raise InputError(f"model_max_length={length!r} is not the length of a prompt: fetch the files again.")
    return int(length) if length < 10**6 else CONTEXT_LENGTH  # transformers writes 10**30 for "not set"


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _added_tokens(settings: dict[str, Any]) -> list[AddedToken]:
    """The tokens matched before BPE: with SDXL's second tokenizer that is "!" too, as it pads with it."""
    decoder = settings.get("added_tokens_decoder", {})
    listed = [decoder[key] for key in sorted(decoder, key=int)]
    named = [settings[key] for key in ("bos_token", "eos_token", "pad_token")]
    contents = {_content(token) for token in listed}
    # Of two named tokens with one text the later one's flags hold, as in transformers: add both, in this order.
    return [_added_token(token) for token in (*listed, *(t for t in named if _content(t) not in contents))]


def _added_token(token: str | dict[str, Any]) -> AddedToken:
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    given: dict[str, Any] = {"content": token} if isinstance(token, str) else token
    fields: dict[str, Any] = {"special": True} | {key: given[key] for key in known if key in given}
    return AddedToken(**fields)


def unseen_words(tokenizers: Sequence[CLIPTokenizer], text: str) -> str:
    """The longest end of a text that one of a model's text encoders does not see, "" if all of it fits in each."""
    return max((tokenizer.cut_words(text) for tokenizer in tokenizers), key=len)
