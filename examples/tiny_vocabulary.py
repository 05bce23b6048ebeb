"""A small CLIP vocabulary for models of a few megabytes: CLIP's layout of ids, merges for common prompt words.

As in CLIP, ids 0..255 are the bytes ("!" is 0), 256..511 the bytes at the end of a word, then one id per merge,
then the two specials. Text in any language encodes; words of `WORD_LIST` become few tokens, others fall into letters.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MERGES = 510
VOCABULARY_SIZE = 2 * 256 + MERGES + 2  # the text encoder's `vocab_size`; the last id is EOS

# The most frequent first: a word counts for the learned merges as often as its place in the list is early.
WORD_LIST = """
a of the in with and on an at to by from for portrait person photo man woman face wearing as his her is old young
smiling looking painting style picture image standing sitting holding walking front light background camera
white black red blue green yellow pink purple orange brown grey gold silver dark bright soft warm cold
hair hat glasses beard shirt suit dress jacket coat scarf crown helmet sunglasses hoodie sweater short long curly blond
eyes mouth nose smile happy sad angry surprised serious laughing neutral expression brow skin
oil watercolor pencil drawing sketch comic cartoon anime sculpture statue marble line art poster digital render
cinematic studio lighting sharp focus detailed highly quality realistic film vintage neon pixel sepia flat
city street park forest beach mountain garden kitchen library office snow rain sunset night day sky sea river castle
space astronaut king queen knight wizard chef doctor pirate soldier superhero scientist musician painter student
dog cat horse bird flower tree car bicycle guitar book cup coffee ball umbrella boat train
close up full body half profile view wide angle upper shot beautiful handsome elegant ancient modern futuristic
reading playing riding running dancing singing cooking writing drinking eating sleeping flying
low bad blurry ugly deformed watermark text cropped worst
"""


def byte_symbols() -> dict[int, str]:
    """The visible character that stands for each byte in byte-level BPE (GPT-2, encoder.py), in the order of ids."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def learn_merges(words: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016, algorithm 1), until all words are whole; ties by alphabet."""
    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    weights = {word: len(words) - place for place, word in enumerate(words)}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spellings.items():
            for pair in pairwise(symbols):
                pairs[pair] += weights[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = {word: merge(symbols, best) for word, symbols in spellings.items()}
    return merges


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join each occurrence of the pair, from the left."""
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def write_tokenizer(
    folder: str | Path,
    pad_token: str = EOS,
    *,
    words: Sequence[str] = tuple(WORD_LIST.split()),
    count: int = MERGES,
    max_length: int = 77,
) -> None:
    """Write vocab.json, merges.txt and the two settings files; SDXL's second tokenizer has `pad_token="!"`.

    `words`, the most frequent first, teach the merges; there are `count` ids for them, some unused where fewer make all
    words whole. Prompts are cut to `max_length` tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    symbols = list(byte_symbols().values())
    merges = learn_merges(words, count)
    unused = [f"<|unused{i}|>" for i in range(count - len(merges))]
    ends = [f"{symbol}</w>" for symbol in symbols]
    tokens = [*symbols, *ends, *("".join(pair) for pair in merges), *unused, BOS, EOS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials, indent=2))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
