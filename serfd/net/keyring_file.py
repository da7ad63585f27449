"""The keyring on disk: a JSON list of base64 keys, the first is used for sending (agent.md 9)."""

import base64
import json
import os
from pathlib import Path

from serfd.config import decode_key
from serfd.errors import ConfigError


def load_keyring(file: str) -> list[bytes]:
    """The keys of the file. Raises ConfigError, which does not repeat them."""
    try:
        texts = json.loads(Path(file).read_text(encoding="ascii"))
        if not isinstance(texts, list) or not texts:
            raise ValueError("expected a JSON list of base64 keys, at least one")
        return [decode_key(str(text), what="one of its keys") for text in texts]
    except OSError as error:
        raise ConfigError(f"keyring_file {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"keyring_file {file}: {error}") from None


def save_keyring(file: str, keys: tuple[bytes, ...]) -> str | None:
    """Replace the file as a whole, readable by its owner only; gives what went wrong, or None.

    Small and local, so it is written at once, and synced: a key that others rely on must not be
    lost with the power.
    """
    text = json.dumps([base64.b64encode(key).decode() for key in keys], indent=2)
    beside = f"{file}.new"
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, file)
    except OSError as error:
        return f"cannot write the keyring file: {error.strerror}"
    return None
