"""AES-GCM sealing and the keyring (gossip.md 3.4 and 10).

The `cryptography` package costs 7 MB and is imported when the first key is there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from serfd.errors import CommandError, WireError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_SIZES = (16, 24, 32)
"""Bytes of a key: AES-128, 192 or 256."""

NONCE_SIZE = 12
_TAG_SIZE = 16
_BLOCK = 16

SEALING_OVERHEAD = 1 + NONCE_SIZE + _TAG_SIZE
"""Bytes that sealing adds in version 1, which is the one every Serf agent sends."""


class Keyring:
    """The cluster's keys in order. The first, the primary, seals; every one opens.

    An empty keyring means that encryption is off. Errors are Serf's (serf.md 12.1). Keys appear in
    no text this class makes.
    """

    __slots__ = ("_ciphers", "_wrong_key")

    def __init__(self, keys: Sequence[bytes] = ()) -> None:
        """Take `keys`, the primary first; repeated ones count once.

        Raises CommandError for a key of a wrong size.
        """
        self._ciphers: dict[bytes, AESGCM] = {}
        self._wrong_key: type[Exception] | tuple[()] = ()
        for key in keys:
            self.add(key)

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._ciphers)

    def __repr__(self) -> str:
        """Say how many keys there are, not which."""
        return f"<Keyring of {len(self)} keys>"

    @property
    def keys(self) -> tuple[bytes, ...]:
        """All keys, the primary first."""
        return tuple(self._ciphers)

    @property
    def primary(self) -> bytes | None:
        """The key that seals, or None if there is no key."""
        return next(iter(self._ciphers), None)

    def add(self, key: bytes) -> None:
        """Add a key at the end, unless it is there. Raises CommandError if its size is wrong."""
        if len(key) not in KEY_SIZES:
            raise CommandError("key size must be 16, 24 or 32 bytes")
        if key not in self._ciphers:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM

            self._wrong_key = InvalidTag
            self._ciphers[key] = AESGCM(key)

    def use(self, key: bytes) -> None:
        """Make a key of this ring the primary. Raises CommandError if it is not there."""
        if key not in self._ciphers:
            raise CommandError("Requested key is not in the keyring")
        self._ciphers = {key: self._ciphers[key], **self._ciphers}

    def remove(self, key: bytes) -> None:
        """Forget a key; one that is not there is no error. Raises CommandError for the primary."""
        if key == self.primary:
            raise CommandError("Removing the primary key is not allowed")
        self._ciphers.pop(key, None)

    def seal(
        self,
        plaintext: bytes,
        *,
        associated: bytes,
        nonce: bytes,
        version: int = 1,
        key: bytes | None = None,
    ) -> bytes:
        """Version byte, nonce, ciphertext and tag, sealed with the primary or this `key` of it.

        `associated` is what must be the same for who opens it. Version 0 pads, for peers that
        speak memberlist protocol 1.
        """
        assert plaintext, "an empty plaintext upsets peers (gossip.md 3.4)"
        assert len(nonce) == NONCE_SIZE
        assert version in (0, 1)
        cipher = self._ciphers[key] if key else next(iter(self._ciphers.values()))
        if version == 0:
            padding = _BLOCK - len(plaintext) % _BLOCK
            plaintext += bytes((padding,)) * padding
        sealed = cipher.encrypt(nonce, plaintext, associated)
        return bytes((version,)) + nonce + sealed

    def open(self, sealed: bytes, *, associated: bytes) -> bytes:
        """What was sealed, opened with the first key that fits.

        Raises WireError if none does, or if it is no sealed message of version 0 or 1.
        """
        if len(sealed) < SEALING_OVERHEAD or sealed[0] > 1:
            raise WireError("not a sealed message of version 0 or 1")
        nonce = sealed[1 : 1 + NONCE_SIZE]
        ciphertext = sealed[1 + NONCE_SIZE :]
        for cipher in self._ciphers.values():
            try:
                plaintext = cipher.decrypt(nonce, ciphertext, associated)
            except self._wrong_key:
                continue
            return plaintext if sealed[0] == 1 else _unpadded(plaintext)
        raise WireError("no installed keys could decrypt the message")


def _unpadded(plaintext: bytes) -> bytes:
    padding = plaintext[-1] if plaintext else 0
    if not 1 <= padding <= min(_BLOCK, len(plaintext)):
        raise WireError("sealed message of version 0 with wrong padding")
    return plaintext[:-padding]
