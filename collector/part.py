"""How a segment of the journal travels to another host: in parts of bounded size, packed, with its checksum.

PUT /api/segments/{name}        content-range: bytes 0-8388607/9000000
                                x-ratchet-sha256: <of the whole segment>
one zstd frame                  -> 202 part stored; 200 the whole is on disk under its name
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import zstandard

from collector.errors import BadInput, Conflict

PART_BYTES = 8 << 20
DIGEST = "x-ratchet-sha256"
_LEVEL = 1  # the fastest: it takes most of what repeats, and the link between hosts is rarely the bottleneck
_RANGE = re.compile(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Refused(Conflict):
    """409: the segment can never be taken. Whoever sent it sets it aside and reports it."""

    code = "segment_refused"


class Garbled(BadInput):
    """400: what arrived is not what was sent, or is no part of a segment. To be sent again."""

    status = 400
    code = "garbled"


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `end` (exclusive) of a segment of `total` bytes, whose sha256 is `digest`."""

    start: int
    end: int
    total: int
    digest: str

    @classmethod
    def read(cls, headers: Mapping[str, str]) -> "Part":
        """What a request's headers say. Raises Garbled that names the header."""
        found = _RANGE.fullmatch(headers.get("content-range", ""))
        digest = headers.get(DIGEST, "")
        if found is None:
            raise Garbled("content-range: give `bytes first-last/total`", param="content-range")
        if not _SHA256.fullmatch(digest):
            raise Garbled(f"{DIGEST}: give the segment's sha256 in hex", param=DIGEST)
        part = cls(int(found[1]), int(found[2]) + 1, int(found[3]), digest)
        if not part.start < part.end <= part.total or part.end - part.start > PART_BYTES:
            raise Garbled(f"content-range: a part has 1 to {PART_BYTES} bytes of its segment", param="content-range")
        return part

    @property
    def headers(self) -> dict[str, str]:
        """The same as a request's headers."""
        return {"content-range": f"bytes {self.start}-{self.end - 1}/{self.total}", DIGEST: self.digest}

    def unpack(self, packed: bytes) -> bytes:
        """The part's bytes. Raises Garbled; never makes more of them than the part says."""
        size = self.end - self.start
        try:
            if zstandard.frame_content_size(packed) != size:
                raise Garbled(f"body: is no zstd frame of {size} bytes", param="body")
            return zstandard.ZstdDecompressor().decompress(packed)
        except zstandard.ZstdError as error:
            raise Garbled(f"body: {error}", param="body") from None


def parts(path: Path, size: int = PART_BYTES) -> Iterator[tuple[Part, bytes]]:
    """The parts of a file in order, each with its packed bytes; one of them in memory at a time. Raises OSError."""
    packer = zstandard.ZstdCompressor(level=_LEVEL)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        total = file.tell()
        file.seek(0)
        for start in range(0, total, size):
            data = file.read(size)
            yield Part(start, start + len(data), total, digest), packer.compress(data)
