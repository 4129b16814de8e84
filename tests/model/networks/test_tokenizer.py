"""The tokenizer against transformers.CLIPTokenizer of the same table, and where it differs on purpose."""

import json
import pickle
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from diffray.model.errors import CheckpointError
from diffray.model.networks.tokenizer import BOS, EOS, ClipTokenizer

FIXED = [
    "",
    " ",
    "a photo of a cat",
    "A Photo, of a CAT!!! wow! it's we're I'd they'll 'tis O'Brien",
    "3.14 x 1024x1024 ½ ² Ⅷ ٣",
    "tabs\tand\nnew\r\nlines\u00a0and\u2003spaces\u3000",
    "émigré naïve Straße İstanbul ΌΣΟΣ ǅ ﬁ ß",
    "e\u0301 vs \u00e9, a\u0308\u0323",
    "👩‍👩‍👧‍👦 👍🏽 🇺🇳 ✈️ emoji",
    "猫の写真 一只猫的照片 고양이 사진",
    "صورة قطة תמונה של חתול \u202eRTL\u202c",
    "nul\0 bell\x07 esc\x1b del\x7f soft\u00adhyphen zero\u200bwidth bom\ufeff",
    "quotes “smart” ‘single’ &amp; &lt;html&gt; <b>",
    "http://example.com/a?b=c&d=%20 user@host #hash $5 50% _under_score_",
    "(weights:1.2) [and] {more} \\( BREAK <lora:x:1>",
    "\U0010ffff\ufffd\U000e0001",
    "a" * 1000,
    ",,,,,....!!!!????",
]


@cache
def openai() -> tuple[ClipTokenizer, CLIPTokenizer]:
    """Ours, and transformers' from the same vocabulary."""
    ours = ClipTokenizer.openai()
    return ours, rival(ours)


@cache
def small() -> tuple[ClipTokenizer, CLIPTokenizer]:
    """A vocabulary like the embedded model's: all bytes and 200 merges, the ids end in the special tokens."""
    full = ClipTokenizer.openai()
    lines = full.files()["merges.txt"].split("\n")[:201]
    names = sorted(full.vocab, key=full.vocab.__getitem__)[: 512 + 200]
    ours = ClipTokenizer.from_files({name: i for i, name in enumerate([*names, BOS, EOS])}, lines)
    return ours, rival(ours)


def rival(ours: ClipTokenizer) -> CLIPTokenizer:
    lines = ours.files()["merges.txt"].strip().split("\n")[1:]
    return CLIPTokenizer(vocab=ours.vocab, merges=[tuple(line.split(" ")) for line in lines])


def plain(theirs: CLIPTokenizer, text: str) -> list[int]:
    return theirs(text, add_special_tokens=False)["input_ids"]


def no_specials(text: str) -> bool:
    return "<|startoftext|>" not in text.lower() and "<|endoftext|>" not in text.lower()


@pytest.mark.parametrize("pair", [openai, small])
@pytest.mark.parametrize("text", FIXED)
def test_fixed_texts_as_transformers(pair, text):
    ours, theirs = pair()
    assert ours.encode(text) == plain(theirs, text)


WORDS = [
    "a",
    "the ",
    "cat",
    " CAT's",
    "!",
    " ",
    ",",
    "don't",
    "é",
    "e\u0301",
    "🐱",
    "猫",
    "\0",
    "1",
    "<|",
    "|>",
]
TEXTS = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(WORDS), max_size=30).map("".join))


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(TEXTS.filter(no_specials))
def test_openai_as_transformers(text):
    ours, theirs = openai()
    assert ours.encode(text) == plain(theirs, text)


@settings(max_examples=1000, deadline=None)
@given(TEXTS.filter(no_specials))
def test_small_vocabulary_as_transformers(text):
    ours, theirs = small()
    assert ours.encode(text) == plain(theirs, text)


def test_openai_anchors():
    """Ids that are published for CLIP, independent of transformers."""
    ours = ClipTokenizer.openai()
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (49408, 49406, 49407)
    assert ours.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert ours.encode("wow!") == [2781, 256]
    assert ClipTokenizer.openai() is ours


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([BOS, EOS, EOS.upper(), " ", "a"]) | st.text(max_size=5)).map("".join))
@example(EOS)
def test_text_never_reaches_special_ids(text):
    for ours, _ in (openai(), small()):
        assert not {ours.bos_id, ours.eos_id} & set(ours.encode(text))


def test_special_tokens_are_plain_words():
    ours = ClipTokenizer.openai()
    assert ours.encode(EOS) == ours.encode("<| endoftext |>")


def test_missing_bytes_are_dropped():
    ours = ClipTokenizer({"a": 0, "b</w>": 1, "ab</w>": 2, BOS: 3, EOS: 4}, [("a", "b</w>")])
    assert ours.encode("ab xab") == [2, 2]


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(categories=["Cs", "Lu", "So"]), max_size=20))
@example("\ud83d\udc31")
def test_surrogates(text):
    """JSON can carry surrogates: pairs are the character they mean, lone ones the replacement character."""
    ours = ClipTokenizer.openai()
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert ours.encode(text) == ours.encode(joined)
    assert ours.encode("\ud83d\udc31") == ours.encode("🐱")


@pytest.mark.timeout(120)  # quadratic time takes hours
@pytest.mark.parametrize("unit", ["a", "!", "a ", "猫", "\u0301", "(", "\0", "'s", "🐱"])
def test_long_text_in_bounded_time(unit):
    assert ClipTokenizer.openai().encode(unit * (100_000 // len(unit)))


@pytest.mark.parametrize("pad_id", [None, 0])
@pytest.mark.parametrize("pair", [openai, small])
def test_files_load_in_transformers(tmp_path, pair, pad_id):
    ours, _ = pair()
    for name, content in ours.files(pad_id).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a photo of a cat, 猫 🐱"
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id == (ours.eos_id if pad_id is None else pad_id)
    assert theirs.model_max_length == 77
    assert plain(theirs, text) == ours.encode(text)
    again = ClipTokenizer.from_folder(tmp_path)
    assert again.files(pad_id) == ours.files(pad_id)
    # What transformers 5 itself writes has no vocab.json: tokenizer.json is read then.
    theirs.save_pretrained(tmp_path / "saved")
    saved = ClipTokenizer.from_folder(tmp_path / "saved")
    assert saved.vocab == ours.vocab
    assert [saved.encode(text) for text in FIXED] == [ours.encode(text) for text in FIXED]


def test_exclamation_mark_is_a_word_whatever_pads(tmp_path):
    ours = ClipTokenizer.openai()
    for name, content in ours.files(pad_id=0).items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert plain(CLIPTokenizer.from_pretrained(tmp_path), "wow!") == [2781, 0]  # why this is done here at all
    assert ClipTokenizer.from_folder(tmp_path).encode("wow!") == [2781, 256]


def test_special_token_names_of_the_folder(tmp_path):
    vocab = {"a</w>": 0, "<s>": 1, "</s>": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = ClipTokenizer.from_folder(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.encode("A")) == (1, 2, [0])


def test_pickle():
    ours, _ = small()
    again = pickle.loads(pickle.dumps(ours))
    assert again.files() == ours.files()
    assert again.encode("hello world") == ours.encode("hello world")


GOOD = {"a": 0, "b</w>": 1, "ab</w>": 2, BOS: 3, EOS: 4}


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({"a": 0}, [], "special token"),
        ({**GOOD, "c": 2}, [], "same id"),
        ({**GOOD, "c": -1}, [], "allowed is 0..2147483647"),
        ({**GOOD, "c": "7"}, [], "id '7'"),
        ({**GOOD, "c": 2**31}, [], "'c' has the id 2147483648"),
        ({**GOOD, "c": True}, [], "id True"),
        (GOOD, ["a"], "joins two tokens"),
        (GOOD, ["a z"], "does not fit"),
        ({**GOOD, "z": 5}, ["a z"], "'a' 'z' does not fit"),
        ({**GOOD, "<|": 5, "endoftext|>": 6}, ["<| endoftext|>"], "does not fit"),  # text would reach EOS
    ],
)
def test_bad_tables(vocab, merges, message):
    with pytest.raises(CheckpointError, match=message):
        ClipTokenizer.from_files(vocab, merges)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"vocab.json": "{}"},
        {"vocab.json": "[]", "merges.txt": ""},
        {"vocab.json": "{", "merges.txt": ""},
        {"vocab.json": b"\xff\xfe", "merges.txt": ""},
        {"tokenizer.json": "{}"},
        {"tokenizer.json": json.dumps({"model": {"vocab": GOOD}})},
        {"tokenizer.json": json.dumps({"model": {"vocab": GOOD, "merges": [7]}})},
        {"tokenizer.json": json.dumps({"model": {"vocab": GOOD, "merges": [["a", 1]]}})},
        {"tokenizer.json": json.dumps({"model": {"vocab": [], "merges": []}})},
        {"tokenizer_config.json": "7", "vocab.json": json.dumps(GOOD), "merges.txt": ""},
    ],
)
def test_bad_folders(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError):
        ClipTokenizer.from_folder(tmp_path)
