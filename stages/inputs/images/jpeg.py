"""Which JPEG files every decoder reads alike: whole ones of the usual kind, nothing in them damaged that is not pixels.

Decoders differ in what they forgive. So that the same files fail whoever decodes, a file of which libjpeg, which
Pillow uses, could refuse a part is none of these: Pillow decodes it, or says why it cannot be.
"""

import re
from functools import lru_cache

_SOI, _EOI, _SOS, _DHT, _DQT, _DRI, _ADOBE, _COMMENT = 0xD8, 0xD9, 0xDA, 0xC4, 0xDB, 0xDD, 0xEE, 0xFE
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2
_APPLICATION = range(0xE0, 0xF0)
_IDS = (b"\1", b"\1\2\3")  # of components: gray, and luminance with two of colour
_SAMPLING = (b"\x11", b"\x12", b"\x21", b"\x22", b"\x41")  # 4:4:4, 4:4:0, 4:2:2, 4:2:0 and 4:1:1
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # but restarts and bytes that only look like one


def is_plain_jpeg(data: bytes) -> bool:
    r"""Whether a file is a whole JPEG, baseline or progressive, 8 bits, gray or YCbCr, all of its tables sound.

    >>> is_plain_jpeg(b"\xff\xd8\xff\xd9"), is_plain_jpeg(b"")
    (False, False)
    """
    if data[:2] != bytes((0xFF, _SOI)):
        return False
    walk, at = _Walk(), 2
    while True:
        kind = data[at + 1 : at + 2]
        if data[at : at + 1] != b"\xff" or not kind:
            return False
        if kind[0] == _EOI:
            return walk.is_complete
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        if length < 2 or len(body) != length - 2 or not walk.takes(kind[0], body):
            return False
        at += 2 + length
        if kind[0] == _SOS:
            found = _NEXT_MARKER.search(data, at)
            if found is None:
                return False
            at = found.start()


class _Walk:
    """What the segments of a file said so far."""

    def __init__(self) -> None:
        self.progressive = False
        self.components = b""
        self.quantisers: set[int] = set()
        self.huffman: set[int] = set()  # 0x10 for AC, with the number of the table
        self.tables_of: dict[int, int] = {}
        self.scans = 0
        self._first: set[int] = set()  # components whose DC values came

    @property
    def is_complete(self) -> bool:
        """Whether every component has come."""
        return bool(self.components) and self._first == set(self.components)

    def takes(self, kind: int, body: bytes) -> bool:
        """Go on by a segment; whether it is one that every decoder understands."""
        if kind == _ADOBE and body.startswith(b"Adobe"):
            return len(body) >= 12 and body[11] == 1  # YCbCr
        if kind in _APPLICATION or kind == _COMMENT:
            return True
        if kind in (_BASELINE, _PROGRESSIVE):
            return self._frame(kind == _PROGRESSIVE, body)
        if kind == _DQT:
            return self._take_quantisers(body)
        if kind == _DHT:
            found = huffman_tables(body)
            self.huffman.update(found)
            return bool(found)
        if kind == _DRI:
            return len(body) == 2
        return kind == _SOS and self._scan(body)

    def _frame(self, progressive: bool, body: bytes) -> bool:
        if self.components or len(body) < 6 or body[0] != 8 or not any(body[1:3]) or not any(body[3:5]):
            return False
        ids, sampling, tables = body[6::3], body[7::3], body[8::3]
        self.progressive, self.components, self.tables_of = progressive, ids, dict(zip(ids, tables, strict=False))
        return (
            len(body) == 6 + 3 * body[5]
            and ids in _IDS
            and sampling[:1] in _SAMPLING
            and set(sampling[1:]) <= {0x11}
            and (len(ids) > 1 or sampling == b"\x11")
        )

    def _take_quantisers(self, body: bytes) -> bool:
        self.quantisers.update(body[::65])
        return len(body) % 65 == 0 and all(number < 4 for number in body[::65]) and not self.scans

    def _scan(self, body: bytes) -> bool:
        self.scans += 1
        n = body[0] if body else 0
        ids, tables, end = body[1 : 1 + 2 * n : 2], body[2 : 2 + 2 * n : 2], body[1 + 2 * n :]
        if not n or len(end) != 3 or len(set(ids)) != n or not set(ids) <= set(self.components):
            return False
        if not {self.tables_of[each] for each in ids} <= self.quantisers:
            return False
        first, last, high, low = end[0], end[1], end[2] >> 4, end[2] & 15
        dc, ac = ({table >> 4 for table in tables}, {16 + (table & 15) for table in tables})
        if not self.progressive:
            fresh = not self._first & set(ids)
            self._first |= set(ids)
            return fresh and (first, last, high, low) == (0, 63, 0, 0) and dc | ac <= self.huffman
        return self._progressive_scan(ids, (first, last, high, low), dc if first == 0 else ac)

    def _progressive_scan(self, ids: bytes, band: tuple[int, int, int, int], tables: set[int]) -> bool:
        """Whether a scan of a progressive file comes in its order: every refinement after what it refines."""
        first, last, high, low = band
        if low > 13 or last > 63 or first > last or (first == 0) != (last == 0) or (first and len(ids) != 1):
            return False
        if high and (high != low + 1):
            return False
        if not first:
            if (not high) == bool(self._first & set(ids)):
                return False
            self._first |= set(ids)
            return bool(high) or tables <= self.huffman
        return set(ids) <= self._first and tables <= self.huffman


@lru_cache(maxsize=256)  # most files have the standard's own
def huffman_tables(body: bytes) -> frozenset[int]:
    """Numbers of the Huffman tables that a segment defines, 16 more for those of AC; none where one is unsound."""
    found, at = set(), 0
    while at < len(body):
        number, counts = body[at], body[at + 1 : at + 17]
        values = body[at + 17 : at + 17 + sum(counts)]
        kind, place = number >> 4, number & 15
        if len(counts) != 16 or len(values) != sum(counts) or len(values) > 256 or kind > 1 or place > 3:
            return frozenset()
        if kind == 0 and any(value > 15 for value in values):
            return frozenset()
        code = 0
        for bits, count in enumerate(counts, 1):  # a code of all ones is none
            code += count
            if code > (1 << bits) - (count > 0):
                return frozenset()
            code <<= 1
        found.add(16 * kind + place)
        at += 17 + len(values)
    return frozenset(found)
