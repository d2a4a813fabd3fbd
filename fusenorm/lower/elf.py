"""What a shared library needs of the machine, read from its ELF dynamic section."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

from fusenorm.errors import BadInput

_NEEDED, _STRTAB = 1, 5
_VERNEED, _VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF
_PT_LOAD, _PT_DYNAMIC = 1, 2
_SHT_DYNSYM = 11


@dataclasses.dataclass(frozen=True)
class Needs:
    """Attributes:
    libraries: shared libraries it loads.
    undefined: symbols it takes from them, weak ones left out.
    defined: symbols it gives.
    versions: symbol versions it asks for.
    """

    libraries: tuple[str, ...]
    undefined: tuple[str, ...]
    defined: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def glibc(self) -> str | None:
        """The least glibc that has every version asked for."""
        found = [name[6:] for name in self.versions if name.startswith("GLIBC_2")]
        return max(found, key=lambda text: [int(part) for part in text.split(".")], default=None)


def read_needs(path: Path) -> Needs:
    """Read a 64-bit little-endian ELF library.

    Raises:
        BadInput: it is none.
    """
    image = _Image(path.read_bytes(), path)
    symbols = list(image.symbols())
    return Needs(
        tuple(image.text(value) for tag, value in image.dynamic if tag == _NEEDED),
        tuple(name for name, defined, weak in symbols if not defined and not weak),
        tuple(name for name, defined, _ in symbols if defined),
        tuple(sorted(set(image.versions()))),
    )


class _Image:
    def __init__(self, content: bytes, path: Path) -> None:
        if content[:6] != b"\x7fELF\x02\x01":
            raise BadInput("not a 64-bit ELF library", file=path)
        self.content = content
        offset, self.sections = struct.unpack_from("<QQ", content, 32)
        size, count, self.section_size, self.section_count = struct.unpack_from("<4H", content, 54)
        self.segments = [
            struct.unpack_from("<IIQQQQ", content, offset + size * i) for i in range(count)
        ]
        start = next(segment for segment in self.segments if segment[0] == _PT_DYNAMIC)
        self.dynamic = list(
            struct.iter_unpack("<QQ", content[start[2] : start[2] + start[5] // 16 * 16])
        )
        self.tags = dict(self.dynamic)
        self.strings = self.at(self.tags[_STRTAB])

    def at(self, address: int) -> int:
        """File offset of an address."""
        for kind, _, offset, base, _, size in self.segments:
            if kind == _PT_LOAD and base <= address < base + size:
                return int(offset + address - base)
        raise ValueError(f"address {address:#x} is in no segment")

    def text(self, offset: int) -> str:
        start = self.strings + offset
        return self.content[start : self.content.index(b"\0", start)].decode()

    def symbols(self) -> Iterator[tuple[str, bool, bool]]:
        """(name, defined, weak) of the dynamic symbols."""
        for i in range(self.section_count):
            at = self.sections + i * self.section_size
            _, kind, _, _, offset, size = struct.unpack_from("<IIQQQQ", self.content, at)
            if kind != _SHT_DYNSYM:
                continue
            table = self.content[offset + 24 : offset + size]
            for name, info, _, section, _, _ in struct.iter_unpack("<IBBHQQ", table):
                yield self.text(name), section != 0, info >> 4 == 2

    def versions(self) -> Iterator[str]:
        if _VERNEED not in self.tags:
            return
        at = self.at(self.tags[_VERNEED])
        for _ in range(self.tags[_VERNEEDNUM]):
            _, count, _, first, following = struct.unpack_from("<HHIII", self.content, at)
            entry = at + first
            for _ in range(count):
                _, _, _, name, step = struct.unpack_from("<IHHII", self.content, entry)
                yield self.text(name)
                entry += step
            at += following
