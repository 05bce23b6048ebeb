"""CLIP's tokenizer: the ids of transformers' CLIPTokenizer on one small vocabulary, and the words it cuts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers

from examples.tiny_vocabulary import VOCABULARY_SIZE, write_tokenizer
from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.tokenizer import BOS, EOS, CLIPTokenizer

TEXTS = [
    "",
    " ",
    "a portrait of a man",
    "  Two  spaces,\ttabs\nand\r\nnewlines \u00a0 ",
    "MiXeD CaSe, ÀÉÎ Straße İstanbul",
    "don't I'll we've they're she's he'd I'm DON'T \u2019s rock'n'roll",
    "a cat!! a dog! wow!?! (really) [x] {y} <z> hello!world",
    "1080p 4k, 3.14 2024-01-02 ½ ٣ Ⅷ",
    "café naïve cafe\u0301",  # composed and decomposed
    "東京の夜 서울 Москва العربية हिन्दी ไทย",
    "smile 😀 family 👨‍👩‍👧 flag 🇫🇷 zero\u200bwidth",
    "Tom &amp; Jerry &lt;b&gt; &#39; a_b c-d e/f",
    "<|startoftext|> inside <|endoftext|> the prompt <|ENDOFTEXT|>",
    "\x00 \x07 control \ufeff \ufffd",
    "photo " * 75,
    "photo " * 76,
    "unbelievably " * 300,
    "x" * 2000,
]


@pytest.fixture(scope="module", params=[EOS, "!"], ids=["pads-with-eos", "pads-with-!"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, pad_token=request.param)
    return path


def reference(folder: Path, texts: list[str]) -> np.ndarray:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    length = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else 77
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids


def detailed_settings(folder: Path, pad_token: str) -> None:
    """The two settings files as SDXL's repository has them: every special token spelt out."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    whole = {token: {"content": token, "normalized": True, **flags} for token in (BOS, EOS)}
    whole["!"] = {"content": "!", "normalized": False, **flags}
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(ids[token]): whole[token] | {"special": True} for token in {BOS, EOS, pad_token}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    specials = {"bos_token": whole[BOS], "eos_token": whole[EOS], "unk_token": whole[EOS], "pad_token": pad_token}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))


def test_ids_equal_transformers(folder):
    ids = CLIPTokenizer.from_folder(folder)(TEXTS)
    assert ids.dtype == np.int32
    assert ids.shape == (len(TEXTS), 77)
    np.testing.assert_array_equal(ids, reference(folder, TEXTS))


@pytest.mark.parametrize("pad_token", [EOS, "!"])
def test_ids_with_special_tokens_spelt_out(tmp_path, pad_token):
    write_tokenizer(tmp_path, pad_token=pad_token)
    detailed_settings(tmp_path, pad_token)
    np.testing.assert_array_equal(CLIPTokenizer.from_folder(tmp_path)(TEXTS), reference(tmp_path, TEXTS))
    # Older folders list the added tokens in special_tokens_map.json alone.
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(CLIPTokenizer.from_folder(tmp_path)(TEXTS), reference(tmp_path, TEXTS))


def test_one_file_folders_give_the_same_ids(folder, tmp_path):
    """transformers 5 saves tokenizer.json in place of vocab.json and merges.txt."""
    transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    np.testing.assert_array_equal(CLIPTokenizer.from_folder(tmp_path)(TEXTS), reference(folder, TEXTS))


def test_an_added_word_has_its_own_id(folder, tmp_path):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<sks>"])
    tokenizer.save_pretrained(tmp_path)
    texts = ["a photo of <sks> smiling", "<sks>"]
    ids = CLIPTokenizer.from_folder(tmp_path)(texts)
    assert ids[1, 1] == VOCABULARY_SIZE
    np.testing.assert_array_equal(ids, reference(tmp_path, texts))


def test_layout_of_a_row(folder):
    tokenizer = CLIPTokenizer.from_folder(folder)
    short, long = tokenizer(["photo", "photo " * 200])
    bos, eos = VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1
    assert (short[0], short[2], short[3]) == (bos, eos, tokenizer.pad_id)
    assert (short[3:] == tokenizer.pad_id).all()
    assert (long[0], long[-1]) == (bos, eos)
    assert (long[1:-1] == short[1]).all()
    assert tokenizer.pad_id in (eos, 0)


def test_the_settings_say_how_long_a_row_is(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for length, expected in ((16, 16), (10**30, 77), (1e30, 77)):
        path.write_text(json.dumps(config | {"model_max_length": length}))
        assert CLIPTokenizer.from_folder(tmp_path)(["a photo"]).shape == (1, expected)
    path.unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    assert CLIPTokenizer.from_folder(tmp_path)(["a photo"]).shape == (1, 77)


def test_no_texts_make_no_rows(folder):
    assert CLIPTokenizer.from_folder(folder)([]).shape == (0, 77)


def test_what_fits_is_not_cut(folder):
    tokenizer = CLIPTokenizer.from_folder(folder)
    for text in ("", "a photo", "photo " * 75, "photo " * 75 + " \n "):
        assert tokenizer.cut_words(text) == ""


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("photo " * 75 + "Red  HAT,\n blue Coat ", "Red  HAT,\n blue Coat"),  # the user's case and spaces
        ("photo " * 74 + "Unbelievable scarf", "Unbelievable scarf"),  # a word that fits in part is cut whole
        ("photo " * 74 + "hat, red scarf", ", red scarf"),  # but not the word before a comma
        ("photo " * 74 + "don't smile", "don't smile"),
        ("photo " * 74 + "1080p scarf", "1080p scarf"),
        ("cafe\u0301 " + "photo " * 80 + "café", None),  # a letter in two code points moves no offset
        ("photo " * 75 + "😀 smiling", "😀 smiling"),
        ("photo " * 74 + "東京の夜", "東京の夜"),
    ],
)
def test_cut_words_are_the_users_own(folder, text, cut):
    tokenizer = CLIPTokenizer.from_folder(folder)
    actual = tokenizer.cut_words(text)
    assert text.rstrip().endswith(actual)
    if cut is not None:
        assert actual == cut
    kept = text.rstrip()[: -len(actual)]
    assert tokenizer.cut_words(kept) == ""
    assert tokenizer.cut_words(f"{kept} {actual.split()[0]}") != ""


def test_a_prompt_of_300_tokens_names_the_last_words(folder):
    words = [f"photo{'s' if i % 7 == 0 else ''} of hat" for i in range(100)]
    tokenizer = CLIPTokenizer.from_folder(folder)
    text = " ".join(words)
    cut = tokenizer.cut_words(text)
    kept = text[: -len(cut)]
    np.testing.assert_array_equal(tokenizer([text])[0, :70], tokenizer([kept])[0, :70])
    assert cut.split() == text.split()[-len(cut.split()) :]


def damaged(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", "{"),
        ("vocab.json", "[1, 2]"),
        ("vocab.json", "{}"),
        ("vocab.json", json.dumps({BOS: 0, EOS: 1})),
        ("merges.txt", "#version: 0.2\na b c\n"),
        ("merges.txt", "#version: 0.2\nqq zz\n"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", '{"model_max_length": 2}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("special_tokens_map.json", '{"pad_token": null}'),
    ],
)
def test_damaged_files_name_the_folder(folder, tmp_path, name, content):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    damaged(tmp_path, name, content)
    with pytest.raises(InputError, match=str(tmp_path)):
        CLIPTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("present", [[], ["vocab.json"], ["merges.txt"]])
def test_missing_files_name_the_folder(folder, tmp_path, present):
    for name in present:
        shutil.copy(folder / name, tmp_path)
    with pytest.raises(InputError, match=f"{tmp_path} holds neither vocab.json with merges.txt nor tokenizer.json"):
        CLIPTokenizer.from_folder(tmp_path)


def test_a_damaged_single_file_names_the_folder(tmp_path):
    damaged(tmp_path, "tokenizer.json", '{"version": "1.0"}')
    with pytest.raises(InputError, match=str(tmp_path)):
        CLIPTokenizer.from_folder(tmp_path)


def test_text_that_is_not_unicode_is_refused(folder):
    with pytest.raises(InputError, match="not valid Unicode"):
        CLIPTokenizer.from_folder(folder)(["caf\udce9"])


def test_the_vocabulary_has_clips_layout_and_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        write_tokenizer(tmp_path / name)
    one, two = ((tmp_path / name / "vocab.json").read_bytes() for name in ("one", "two"))
    assert one == two
    vocabulary = json.loads(one)
    assert sorted(vocabulary.values()) == list(range(VOCABULARY_SIZE))
    assert (vocabulary["!"], vocabulary["!</w>"]) == (0, 256)
    assert (vocabulary[BOS], vocabulary[EOS]) == (VOCABULARY_SIZE - 2, VOCABULARY_SIZE - 1)
    ids = CLIPTokenizer.from_folder(tmp_path / "one")(["a portrait of a woman wearing a hat"])
    assert list(ids[0]).index(VOCABULARY_SIZE - 1) == 9  # one token a word, BOS before, EOS here
