"""The keyring on disk: a JSON list of base64 keys, the first is used for sending (agent.md 9)."""

import base64
import json
from pathlib import Path

from serfd.config import decode_key
from serfd.errors import ConfigError
from serfd.net.whole_file import write_whole


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
    """Replace the file as a whole, readable by its owner only; gives what went wrong, or None."""
    text = json.dumps([base64.b64encode(key).decode() for key in keys], indent=2)
    try:
        write_whole(file, text)
    except OSError as error:
        return f"cannot write the keyring file: {error.strerror}"
    return None
