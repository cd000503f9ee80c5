"""Checksums of a file, from one reading of it, and those that stores give of an object."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

BLOCK = 2**20
# Bytes of the parts in which S3 is sent what has two of them. It is also what s3fs does by itself,
# so that objects which were put before are known, too.
PART = 50 * BLOCK


@dataclass(frozen=True)
class Checksums:
    """Of a file, in hexadecimal digits. etag: what S3 calls an object that was sent in parts of
    PART bytes, the MD5 of their MD5s and how many there are; of a small one its MD5."""

    sha256: str
    md5: str
    etag: str

    @classmethod
    def of(cls, path: Path) -> Self:
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        in_parts = path.stat().st_size >= 2 * PART
        of_parts: list[bytes] = []
        with path.open("rb") as file:
            while True:
                part, size = hashlib.md5(usedforsecurity=False), 0
                while size < PART and (block := file.read(BLOCK)):
                    size += len(block)
                    sha256.update(block)
                    md5.update(block)
                    if in_parts:
                        part.update(block)
                of_parts.append(part.digest())
                if size < PART or not file.peek(1):
                    break
        etag = md5.hexdigest()
        if in_parts:
            whole = hashlib.md5(b"".join(of_parts), usedforsecurity=False)
            etag = f"{whole.hexdigest()}-{len(of_parts)}"
        return cls(sha256.hexdigest(), md5.hexdigest(), etag)

    def are_of(self, info: Mapping[str, Any]) -> bool:
        """Whether a store says that an object has these. An ETag may be something else, and then
        differs."""
        if info.get("md5Hash"):
            return base64.b64decode(info["md5Hash"]).hex() == self.md5
        return str(info.get("ETag", "")).strip('"') in (self.md5, self.etag)
