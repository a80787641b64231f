"""Lines as hashes: CCNet's normalisation and hash, the fast way equal to the definition, lines kept by a mask."""

import hashlib
import sys

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.dedup.lines import KINDS, MARKS, hashes_of, keep_lines, line_hashes, normalised_line, normalised_lines

# White space and marks at the ends, controls, other digits, capitals, the final sigma and what its rule looks at.
AWKWARD = (
    "ab Z09\n\n\t\r\x00\x1c\x1f\x7f\x85\x9f\xa0\u2028\u3000’“»…１٣०ΣσAİßǅÉ\u0301\u00ad·\U0001d7d8\U00010400\ud800😀"
)


def definition(text: str) -> list[bytes]:
    return [normalised_line(line).encode("utf-8", "surrogatepass") for line in text.split("\n")]


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.sampled_from(AWKWARD), st.characters()), max_size=60))
@example("")
@example("\n")
@example(" \x00 a\n» b \xa0\n\t\n")
@example("ΟΔΟΣ\nΣ\n ΑΣ. Σ\u0301Σ")
def test_the_fast_way_is_the_definition_on_every_text(text: str) -> None:
    assert normalised_lines(text) == definition(text)


def test_the_fast_way_is_the_definition_for_every_single_character() -> None:
    codes = [*range(0x20000), *range(0x20000, sys.maxunicode + 1, 101)]  # all letters and digits are among the first
    characters = [chr(code) for code in codes if chr(code) != "\n"]
    for begin in range(0, len(characters), 4096):
        text = "\n".join(f"A{char}9{char}" for char in characters[begin : begin + 4096])
        assert normalised_lines(text) == definition(text)


@pytest.mark.parametrize(
    ("line", "normalised"),
    [
        ("  Hello, World!  ", "hello, world!"),  # ASCII punctuation stays
        ("Call 555-0199 now", "call 000-0000 now"),
        ("Été à Çà", "été à çà"),  # accents stay
        ("“Quoted” — it’s…", "quoted  its"),
        ("１２ ٣٤", "00 00"),  # full-width and Arabic digits; CCNet's marks hold １, but it is a digit first
        ("» more", " more"),  # white space goes before the marks do
        ("a\tb\x00c\x9fd", "abcd"),
        ("\u3000\xa0", ""),
    ],
)
def test_a_line_is_normalised_as_ccnet_does(line: str, normalised: str) -> None:
    assert normalised_line(line) == normalised
    assert normalised_lines(line) == [normalised.encode()]


def test_there_are_34_marks() -> None:
    assert len(set(MARKS)) == len(MARKS) == 34


def test_the_ccnet_hash_is_the_first_eight_bytes_of_sha1_little_endian() -> None:
    # SHA-1 of "abc" and of nothing are the published examples: a9993e364706816a…, da39a3ee5e6b4b0d….
    hashes = line_hashes("ABC\n\n abc… \nabd", kind="cc_net")
    assert hashes.dtype == np.uint64
    assert hashes[:3].tolist() == [0x6A810647363E99A9, 0x0D4B6B5EEEA339DA, 0x6A810647363E99A9]
    assert hashes[3] == int.from_bytes(hashlib.sha1(b"abd").digest()[:8], "little")


def test_the_hashes_of_a_page_of_many_scripts_do_not_change() -> None:
    page = "Famous Quotes — 1885\nЦитаты знаменитого Марка Твена\n馬克·吐溫名言：「１」\n\nFamous quotes  0000"
    assert [f"{value:016x}" for value in line_hashes(page, kind="cc_net")] == [
        "f87df78b3bec081d",
        "6114b95ba91fbb60",
        "f62dae29c6d8c1f2",
        "0d4b6b5eeea339da",
        "f87df78b3bec081d",
    ]
    assert line_hashes(page, kind="xxh3").tolist() == [xxhash.xxh3_64_intdigest(line) for line in definition(page)]


@given(st.lists(st.binary(max_size=20), max_size=20))
def test_hashes_keep_the_order(lines: list[bytes]) -> None:
    for kind in KINDS:
        assert hashes_of(lines, kind=kind).tolist() == [int(hashes_of([line], kind=kind)[0]) for line in lines]


def test_an_unknown_kind_of_hash_is_an_error() -> None:
    with pytest.raises(ValueError, match="kind=md5"):
        line_hashes("a", kind="md5")


@given(st.text("ab\n", max_size=20), st.randoms(use_true_random=False))
def test_the_lines_of_the_mask_are_kept(text: str, random) -> None:  # type: ignore[no-untyped-def]
    lines = text.split("\n")
    mask = [random.random() < 0.5 for _ in lines]
    kept = [line for line, keep in zip(lines, mask, strict=True) if keep]
    assert keep_lines(text, mask) == keep_lines(text, np.array(mask)) == "\n".join(kept)


def test_a_mask_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 truth values for 2 lines"):
        keep_lines("a\nb", [True])
