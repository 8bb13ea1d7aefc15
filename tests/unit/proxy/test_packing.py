"""Packed bodies: unpacked to the byte, and a bomb only as far as the limit."""

import gzip
import zlib
from typing import Any

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest, TooLarge
from proxy.packing import unpack
from proxy.reply import decoded


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


PACKERS: dict[str, Any] = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda body: brotli.compress(body, quality=1),
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("encoding", PACKERS)
@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=5000))
def test_what_was_packed_comes_out_as_it_was(encoding: str, body: bytes) -> None:
    assert unpack(PACKERS[encoding](body), encoding, 5000) == body
    assert decoded(PACKERS[encoding](body), encoding) == body


def test_deflate_without_its_header_is_understood_too() -> None:
    assert unpack(raw_deflate(b"hello" * 99), "deflate", 1000) == b"hello" * 99


@pytest.mark.parametrize("encoding", PACKERS)
def test_a_bomb_is_refused_before_it_takes_more_than_the_limit(encoding: str) -> None:
    import tracemalloc

    bomb = PACKERS[encoding](bytes(48 << 20))
    tracemalloc.start()
    with pytest.raises(TooLarge):
        unpack(bomb, encoding, 8 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("encoding", PACKERS)
def test_what_is_cut_or_something_else_is_refused_by_name(encoding: str) -> None:
    packed = PACKERS[encoding](b"some text that is long enough to be cut in the middle" * 20)
    for bad in (b"this is plain text", packed[:-9], packed[: len(packed) // 2]):
        with pytest.raises(BadRequest, match=encoding.removeprefix("x-")):
            unpack(bad, encoding, 1 << 20)


def test_an_encoding_that_is_not_known_is_left_alone() -> None:
    assert unpack(b"x", "compress", 10) is None
    assert decoded(b"x", "compress") is None
