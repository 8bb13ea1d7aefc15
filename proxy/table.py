"""A small hash table in a mapped file, shared by all workers and by the next ones after a `kill -9`.

Fixed size, sixteen entries a bucket; a full bucket gives up the entry that was used longest ago, so the table holds
about the last `slots` things and never grows. Whoever changes it, or finds something and so notes its use, holds a lock
on the file, which the kernel drops when its holder dies. An entry carries a checksum: a torn one reads as absent.

    bucket   16 keys of 16 bytes | the numbers of the 16 entries, that used longest ago first | 16 entries
    entry    crc32 (u32) | state (u8) | length (u8) | value (<= 136 bytes)
"""

import fcntl
import mmap
import os
import struct
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from zlib import crc32

WAYS = 16
KEY = 16
VALUE = 136
_HEAD = struct.Struct("<IBB")
_ENTRY = _HEAD.size + VALUE
_SIZE = struct.Struct("<Q")
_NUMBER = _SIZE.unpack_from
_PUT_KEY = struct.Struct(f"{KEY}s").pack_into
_PUT_ENTRY = struct.Struct(f"<IBB{VALUE}s").pack_into
_KEYS = WAYS * KEY
_ENTRIES = _KEYS + WAYS  # where they begin in a bucket
_BUCKET = _ENTRIES + WAYS * _ENTRY
_NAMES = struct.Struct(f"{KEY}s" * WAYS)
_ALL = range(WAYS)
_OTHERS = bytes(256 - WAYS)
_IN_ORDER = bytes(range(WAYS))
_MAGIC = b"ratchet2"
_HEADER = 4096
_EMPTY, _LIVE, _TAKEN = 0, 1, 2


class Taken(NamedTuple):
    """What `take` found: the value (None: nothing to take) and how many entries had the key, taken ones included."""

    value: bytes | None
    found: int


def key(kind: str, *parts: str) -> bytes:
    """16 bytes that stand for a thing of a kind."""
    return sha256("\0".join((kind, *parts)).encode()).digest()[:KEY]


class _Lock(AbstractContextManager[None]):
    """The lock on a file, for as long as it is entered."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


class Table:
    """Keys of 16 bytes to values of at most 136. Raises OSError if the file can't be mapped or the disk is full."""

    def __init__(self, path: Path, slots: int = 1 << 16, *, alone: bool = False) -> None:
        """`alone`: no other process writes to it, so that nothing has to be locked."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock: AbstractContextManager[None] = _Lock(self._file)
        with self._lock:
            self._buckets = self._prepare(max(1, slots // WAYS))
        self._alone = alone
        if alone:
            self._lock = nullcontext()
        self._map = mmap.mmap(self._file, _HEADER + self._buckets * _BUCKET)

    def _prepare(self, buckets: int) -> int:
        """The number of buckets of the file, which is laid out when it is new or no table of ours."""
        head = os.pread(self._file, 16, 0)
        if head[:8] == _MAGIC and len(head) == 16:
            (buckets,) = _SIZE.unpack(head[8:])
        else:
            os.ftruncate(self._file, 0)
        os.ftruncate(self._file, _HEADER + buckets * _BUCKET)
        if hasattr(os, "posix_fallocate"):  # who writes to a hole of a mapped file while the disk is full is killed
            os.posix_fallocate(self._file, 0, _HEADER + buckets * _BUCKET)
        os.pwrite(self._file, _MAGIC + _SIZE.pack(buckets), 0)
        return int(buckets)

    def close(self) -> None:
        """Unmaps; the file stays."""
        self._map.close()
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, key: bytes) -> bytes | None:
        """The value, which counts as used now; None where there is none."""
        bucket = self._bucket(key)
        if self._map.find(key, bucket, bucket + _KEYS) < 0:
            return None
        with self._lock:
            return self._get(bucket, key)

    def _get(self, bucket: int, key: bytes) -> bytes | None:
        for way in self._ways(bucket, key):
            found = self._read(bucket, way, key)
            if found is not None and found[0] == _LIVE:
                self._used(bucket, way)
                return found[1]
        return None

    def put_if_absent(self, key: bytes, value: bytes) -> bytes:
        """Stores `value` unless the key is there already; the value that holds, whoever put it."""
        held = self.get(key)
        if held is not None:
            return held
        with self._lock:
            held = self._get(self._bucket(key), key)
            if held is None:
                self._write(key, value)
            return value if held is None else held

    def add(self, key: bytes, value: bytes) -> None:
        """Stores `value` beside others of the same key, to be taken once each."""
        if self._alone:
            self._write(key, value)
            return
        with self._lock:
            self._write(key, value)

    def take(self, key: bytes) -> Taken:
        """Takes the oldest value of a key that nobody has taken; each is handed out once over all processes."""
        bucket = self._bucket(key)
        if self._map.find(key, bucket, bucket + _KEYS) < 0:
            return Taken(None, 0)
        with self._lock:
            entries = [(way, entry) for way in self._ways(bucket, key) if (entry := self._read(bucket, way, key))]
            for way, (state, value) in entries:
                if state == _LIVE:
                    self._store(bucket, way, key, _TAKEN, value)
                    return Taken(value, len(entries))
            return Taken(None, len(entries))

    def give_back(self, key: bytes, value: bytes) -> None:
        """Lets a value that was taken be taken again; where it is gone, it is added anew."""
        bucket = self._bucket(key)
        with self._lock:
            for way in self._ways(bucket, key):
                if self._read(bucket, way, key) == (_TAKEN, value):
                    self._store(bucket, way, key, _LIVE, value)
                    return
            self._write(key, value)

    def _bucket(self, key: bytes) -> int:
        number: int = _NUMBER(key)[0]
        return _HEADER + number % self._buckets * _BUCKET

    def _ways(self, bucket: int, key: bytes) -> list[int]:
        """Where in the bucket the key stands, that used longest ago first."""
        names = _NAMES.unpack_from(self._map, bucket)
        if key not in names:
            return []
        return sorted(compress(_ALL, map(key.__eq__, names)), key=self._order(bucket).index)

    def _order(self, bucket: int) -> bytes:
        """The entries' numbers. Those of a bucket that is new, or whose writer died in the middle, are dealt anew."""
        order = self._map[bucket + _KEYS : bucket + _ENTRIES]
        return order if len({*order}) == WAYS else _IN_ORDER

    def _own(self, bucket: int, key: bytes, order: bytes) -> int:
        """The entry to write over for a key that is there already: its own oldest, once it has half of the bucket."""
        mine = bytes(map(key.__eq__, _NAMES.unpack_from(self._map, bucket)))  # of each entry, 1 or 0
        at = order.translate(mine + _OTHERS).find(1) if mine.count(1) >= WAYS // 2 else 0
        return order[at]

    def _used(self, bucket: int, way: int) -> None:
        order, top = self._order(bucket), bucket + _KEYS
        at = order.index(way)
        self._map[top : top + WAYS] = order[:at] + order[at + 1 :] + order[at : at + 1]

    def _read(self, bucket: int, way: int, key: bytes) -> tuple[int, bytes] | None:
        at = bucket + _ENTRIES + way * _ENTRY
        crc, state, length = _HEAD.unpack_from(self._map, at)
        value = self._map[at + _HEAD.size : at + _HEAD.size + length]
        if state == _EMPTY or crc != _checksum(key, state, value):
            return None
        return state, value

    def _write(self, key: bytes, value: bytes) -> None:
        """Into a free entry, else over the oldest one of the bucket; of a key that has half of it already, over its own
        oldest: what thousands say alike must not push out what others rely on."""
        if len(key) != KEY or len(value) > VALUE:
            raise ValueError(f"keys are {KEY} bytes and values at most {VALUE}")
        mapped = self._map
        bucket = _HEADER + _NUMBER(key)[0] % self._buckets * _BUCKET
        top = bucket + _KEYS
        order = mapped[top : top + WAYS]
        if order[0] == order[1]:  # a new one
            order = _IN_ORDER
        way = order[0]
        if mapped.find(key, bucket, top) >= 0:
            way = self._own(bucket, key, order)
        at = order.find(way)
        if at >= 0:
            mapped[top : top + WAYS] = order[:at] + order[at + 1 :] + order[at : at + 1]
        else:
            self._used(bucket, way)
        _PUT_KEY(mapped, bucket + way * KEY, key)
        self._store(bucket, way, key, _LIVE, value)

    def _store(self, bucket: int, way: int, key: bytes, state: int, value: bytes) -> None:
        at, crc = bucket + _ENTRIES + way * _ENTRY, crc32(value, crc32(key, state))
        _PUT_ENTRY(self._map, at, crc, state, len(value), value)


def _checksum(key: bytes, state: int, value: bytes) -> int:
    return crc32(value, crc32(key, state))
