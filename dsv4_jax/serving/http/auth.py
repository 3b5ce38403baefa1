"""Who may ask: keys are compared in constant time, and what is not listed here needs one."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.http.errors import HttpProblem

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that need no key: those of a supervisor, which tell nothing but whether the server lives, and the
page, which is the same everywhere and asks for the key itself."""

MAX_KEY_FILE_BYTES = 1 << 20
MIN_KEY_CHARS = 8
_PRINTABLE = range(0x21, 0x7F)


class Keys:
    """The keys of a server, of which only hashes are kept.

    Args:
        keys: none: everybody may ask.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._secret = secrets.token_bytes(32)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def tenant(self, path: str, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """A name for whoever asks: a keyed hash of the key, b"" without keys.

        Args:
            path: of the ASGI scope, never of a URL that was put together with the Host header.
            headers: of the request, names in lower case.

        Raises:
            HttpProblem: 401 without a right key.
        """
        if not self._digests:
            return b""
        shown = hashlib.sha256(_shown_key(headers)).digest()
        # Every key is compared, whether or not an earlier one fits.
        if any([hmac.compare_digest(shown, digest) for digest in self._digests]):
            return hmac.digest(self._secret, shown, "sha256")
        if path in OPEN_PATHS:
            return b""
        raise HttpProblem(
            401,
            "a key is needed: 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            kind="authentication_error",
            code="invalid_api_key",
            headers=[("www-authenticate", "Bearer")],
            reason="key",
        )


def _shown_key(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The key of a request; one that shows several different ones shows none."""
    found = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.strip())
        elif name == b"authorization":
            scheme, _, rest = value.strip().partition(b" ")
            found.add(rest.strip() if scheme.lower() == b"bearer" else b"")
    return found.pop() if len(found) == 1 else b""


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ProblemsError: for a file without keys, or lines that cannot be keys; it names lines, not keys.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_KEY_FILE_BYTES + 1)
    problems = [] if len(data) <= MAX_KEY_FILE_BYTES else ["is larger than 1 MiB"]
    keys = []
    for number, line in enumerate(data.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        if len(line) < MIN_KEY_CHARS or not all(byte in _PRINTABLE for byte in line):
            problems.append(f"line {number} must be at least {MIN_KEY_CHARS} printable ASCII characters")
            continue
        keys.append(line.decode("ascii"))
    if not keys and not problems:
        problems.append("holds no key")
    if problems:
        raise ProblemsError(f"the key file {path} cannot be used", problems[:20])
    return keys
