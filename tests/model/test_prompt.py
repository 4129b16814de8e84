"""Prompt syntax and chunking, against the rules written down and a direct model of them."""

import math
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffray.model.errors import InvalidRequest
from diffray.model.networks.tokenizer import ClipTokenizer
from diffray.model.prompt import MAX_CHUNKS, MAX_WEIGHT, Chunk, Piece, chunk, empty_chunk, parse

OPENAI = ClipTokenizer.openai()
BOS, EOS, COMMA = OPENAI.bos_id, OPENAI.eos_id, 267
SYMBOLS = [
    "(",
    ")",
    "[",
    "]",
    "\\",
    ":",
    "1.3",
    "-2",
    ".5",
    "a",
    "b c",
    ",",
    "BREAK",
    " ",
    "!",
    "(x:1.2)",
    "\n",
]
PROMPTS = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(SYMBOLS), max_size=40).map("".join))


def pieces(text: str) -> list[tuple[str, float]]:
    """The only section of `text`, weights rounded."""
    (section,) = parse(text)
    return [(piece.text, round(piece.weight, 9)) for piece in section]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((red))", [("red", 1.21)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: 1.3 )", [("red", 1.3)]),
        ("(red:.5)(blue:2.)", [("red", 0.5), ("blue", 2)]),
        ("(red:+1.5)", [("red", 1.5)]),
        ("(red:-1)", [("red", -1)]),
        ("(red:0)", [("red", 0)]),
        ("[red]", [("red", 0.909090909)]),
        ("[[red]]", [("red", 0.826446281)]),
        ("((a:1.5) b:2)", [("a", 3), (" b", 2)]),
        ("([a])", [("a", 1)]),
        ("(a [b) c] d", [("a ", 1.1), ("b", 1), (" c", 0.909090909), (" d", 1)]),
        ("(a", [("a", 1.1)]),
        ("[a", [("a", 0.909090909)]),
        ("(a (b", [("a ", 1.1), ("b", 1.21)]),
        ("a) b]", [("a) b]", 1)]),
        ("a:1.3) b", [("a:1.3) b", 1)]),
        ("(a:1.3) :)", [("a", 1.3), (" :)", 1)]),
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1)]),
        (r"(a\):1.2)", [("a)", 1.2)]),
        (r"a\b", [("a\\b", 1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:1e3)", [("a:1e3", 1.1)]),
        ("(a:٣)", [("a:٣", 1.1)]),
        ("fo(o)(bar)", [("fo", 1), ("obar", 1.1)]),
        ("()a[]", [("a", 1)]),
        ("(a:99)", [("a", MAX_WEIGHT)]),
        ("(a:-99)", [("a", -MAX_WEIGHT)]),
    ],
)
def test_syntax(text, expected):
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a BREAK b", ["a ", " b"]),
        ("BREAK", ["", ""]),
        ("aBREAK BREAKFAST break", ["aBREAK BREAKFAST break"]),
        ("a,BREAK,b", ["a,", ",b"]),
    ],
)
def test_break_separates_sections(text, expected):
    assert ["".join(piece.text for piece in section) for section in parse(text)] == expected


def test_weight_reaches_over_break():
    assert parse("(a BREAK b:2)") == [[Piece("a ", 2.0)], [Piece(" b", 2.0)]]


@settings(max_examples=1000, deadline=None)
@given(PROMPTS)
@example("(" * 5000 + "a")
@example("[" * 5000 + "a")
@example("(" * 400 + "a:" + "9" * 400 + ")" + ":0)" * 399)
def test_parse_never_raises_and_keeps_the_text(text):
    for section in parse(text):
        assert all(piece.text and math.isfinite(piece.weight) for piece in section)
        assert all(abs(piece.weight) <= MAX_WEIGHT for piece in section)
        assert all(a.weight != b.weight for a, b in pairwise(section))
    kept = "".join(piece.text for section in parse(text) for piece in section)
    remaining = iter(text)
    assert all(character in remaining for character in kept)  # a subsequence: only syntax is taken away


@settings(max_examples=500, deadline=None)
@given(PROMPTS, st.sampled_from([77, 22, 3]))
def test_chunks_are_well_formed(text, positions):
    try:
        chunks = chunk(OPENAI, text, positions=positions, pad_id=0)
    except InvalidRequest:
        assert positions == 3  # at one token per chunk these texts can be too long
        return
    assert 1 <= len(chunks) <= MAX_CHUNKS
    for one in chunks:
        assert len(one.ids) == len(one.weights) == positions
        end = one.ids.index(EOS)
        assert one.ids[0] == BOS
        assert set(one.ids[end + 1 :]) <= {0}
        assert {one.weights[0], *one.weights[end:]} == {1.0}
    inside = [i for one in chunks for i in one.ids[1 : one.ids.index(EOS)]]
    assert inside == [i for section in parse(text) for piece in section for i in OPENAI.encode(piece.text)]


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(exclude_characters="()[]\\"), max_size=40).filter(lambda text: "BREAK" not in text)
)
def test_prompt_without_syntax_is_plain_clip(text):
    ids = OPENAI.encode(text)
    if len(ids) > 75:
        return
    (only,) = chunk(OPENAI, text)
    assert only.ids == (BOS, *ids, EOS, *[EOS] * (75 - len(ids)))
    assert not only.weighted
    (padded,) = chunk(OPENAI, text, pad_id=0)
    assert padded.ids == (BOS, *ids, EOS, *[0] * (75 - len(ids)))


def test_exclamation_mark_is_not_padding():
    (only,) = chunk(OPENAI, "wow!", pad_id=0)
    assert only.ids[:5] == (BOS, 2781, 256, EOS, 0)


def test_weights_belong_to_their_tokens():
    (only,) = chunk(OPENAI, "a (red cat:1.5) on [grass]")
    words = [320, 736, 2368, 525, *OPENAI.encode("grass")]
    assert list(only.ids[1 : 1 + len(words)]) == words
    assert only.weights[1:6] == pytest.approx((1, 1.5, 1.5, 1, 1 / 1.1))
    assert only.weighted


@pytest.mark.parametrize("text", ["(a:2) [b]", "a BREAK b", r"\(a\) \\"])
def test_without_weighting_all_is_text(text):
    (only,) = chunk(OPENAI, text, weighting=False)
    ids = OPENAI.encode(text)
    assert only.ids[1 : 1 + len(ids)] == tuple(ids)
    assert not only.weighted


def test_empty_prompt_is_one_empty_chunk():
    empty = Chunk((BOS, EOS, *[0] * 75), (1.0,) * 77)
    assert empty_chunk(OPENAI, 77, 0) == empty
    for text in ("", "   ", "()", "BREAK"):
        assert chunk(OPENAI, text, pad_id=0) == (empty,)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 150, [75, 75]),
        ("cat " * 75 + "BREAK dog", [75, 1]),
        ("a BREAK b", [1, 1]),
        ("a BREAK", [1]),
        ("BREAK a", [0, 1]),
        ("a BREAK BREAK b", [1, 0, 1]),
        # One comma, at index 60 of the tokens: the 14 tokens after it move to the next chunk.
        ("cat " * 60 + ", " + "dog " * 20, [61, 20]),
        ("cat " * 55 + ", " + "dog " * 30, [56, 30]),  # exactly 20 tokens from the cut: still moves
        ("cat " * 54 + ", " + "dog " * 30, [75, 10]),  # 21: cut inside
        ("cat " * 74 + ", " + "dog " * 5, [75, 5]),  # the comma is the last that fits
        ("cat " * 60 + ", " + "dog " * 14 + ", end", [75, 2]),  # the comma itself is what does not fit
        ("cat " * 60 + ", " + "dog " * 14, [75]),  # fits, nothing is cut
    ],
)
def test_chunk_sizes(text, counts):
    assert [one.ids.index(EOS) - 1 for one in chunk(OPENAI, text)] == counts


def reference(ids: list[int], size: int) -> list[list[int]]:
    """Comma back-tracking as a machine that is fed one token after the other."""
    done: list[list[int]] = []
    current: list[int] = []
    for token in ids:
        if len(current) == size and token != COMMA and COMMA in current[-20:]:
            cut = len(current) - current[::-1].index(COMMA)
            done.append(current[:cut])
            current = current[cut:]
        if len(current) == size:
            done.append(current)
            current = []
        current.append(token)
    return [*done, current]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["cat ", "dog ", ", "]), max_size=250).map("".join),
    st.sampled_from([77, 40, 12]),
)
def test_comma_backtracking(text, positions):
    expected = reference(OPENAI.encode(text), positions - 2)
    if len(expected) <= MAX_CHUNKS:
        chunks = chunk(OPENAI, text, positions=positions)
        assert [list(one.ids[1 : one.ids.index(EOS)]) for one in chunks] == expected


def test_too_many_chunks():
    assert len(chunk(OPENAI, "cat " * 75 * MAX_CHUNKS)) == MAX_CHUNKS
    with pytest.raises(InvalidRequest, match=f"33 chunks, allowed are {MAX_CHUNKS}") as caught:
        chunk(OPENAI, "cat " * (75 * MAX_CHUNKS + 1), field="negative_prompt")
    assert caught.value.field == "negative_prompt"


@cache
def hostile() -> list[str]:
    n = 20_000  # the longest prompt a request may have
    units = ["(", "[", "(a", "[a", ")", ":", ":1", "\\", " ", "BREAK ", "(a:1", ":1)", "([", "(a:1)"]
    texts = [unit * (n // len(unit)) for unit in units]
    return [
        *texts,
        "(a" * (n // 4) + ")" * (n // 4),
        ":" + "1" * n,
        "(a:" + " " * n + "1)",
        "(a:1." + "0" * n,
    ]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("index", range(18))
def test_hostile_text_in_bounded_time(index):
    parse(hostile()[index])
