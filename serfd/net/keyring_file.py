"""The keyring on disk: a JSON list of base64 keys, the first is used for sending (agent.md 9)."""

import base64
import json
import logging

from serfd.config import decode_key
from serfd.errors import ConfigError
from serfd.net.whole_file import write_whole

SIZE_MAX = 1 << 20
"""Bytes; a key takes fifty."""

_log = logging.getLogger("serfd.agent")


def load_keyring(file: str) -> list[bytes]:
    """The keys of the file. Raises ConfigError, which does not repeat them."""
    try:
        with open(file, "rb") as held:
            content = held.read(SIZE_MAX + 1)
        if len(content) > SIZE_MAX:
            raise ValueError(f"longer than {SIZE_MAX} bytes")
        texts = json.loads(content.decode("ascii"))
        if not isinstance(texts, list) or not texts:
            raise ValueError("expected a JSON list of base64 keys, at least one")
        keys = [decode_key(str(text), what="one of its keys") for text in texts]
    except OSError as error:
        raise ConfigError(f"keyring_file {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"keyring_file {file}: {error}") from None
    _log.info("Restored keyring with %d keys from %s", len(keys), file)
    return keys


def save_keyring(file: str, keys: tuple[bytes, ...]) -> str | None:
    """Replace the file as a whole, readable by its owner only; gives what went wrong, or None."""
    text = json.dumps([base64.b64encode(key).decode() for key in keys], indent=2)
    try:
        write_whole(file, text)
    except OSError as error:
        return f"cannot write the keyring file: {error.strerror}"
    return None
