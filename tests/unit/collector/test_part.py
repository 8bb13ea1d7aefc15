"""Parts of a segment: what is read back is what was sent, and what is no part is refused before it costs memory."""

import tempfile
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from collector.part import DIGEST, PART_BYTES, Garbled, Part, parts


@given(st.binary(min_size=1, max_size=300), st.integers(1, 64))
def test_the_parts_of_a_file_together_are_the_file(content: bytes, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "segment"
        path.write_bytes(content)
        found = list(parts(path, size))
    assert b"".join(Part.read(part.headers).unpack(packed) for part, packed in found) == content
    assert [part.start for part, _ in found] == list(range(0, len(content), size))
    assert {part.total for part, _ in found} == {len(content)}


@pytest.mark.parametrize(
    ("span", "digest", "param"),
    [
        ("", "0" * 64, "content-range"),
        ("bytes 5-4/10", "0" * 64, "content-range"),
        ("bytes 0-10/10", "0" * 64, "content-range"),
        (f"bytes 0-{PART_BYTES}/{PART_BYTES + 1}", "0" * 64, "content-range"),
        ("bytes 0-9/10", "abc", DIGEST),
    ],
)
def test_headers_that_say_no_part_are_named(span: str, digest: str, param: str) -> None:
    with pytest.raises(Garbled) as caught:
        Part.read({"content-range": span, DIGEST: digest})
    assert caught.value.param == param


def test_a_body_of_another_size_is_not_unpacked() -> None:
    part = Part(0, 10, 10, "0" * 64)
    bomb = zstandard.compress(bytes(PART_BYTES))
    for packed in (bomb, b"no frame", zstandard.compress(b"0123456789")[:-3]):
        with pytest.raises(Garbled):
            part.unpack(packed)
