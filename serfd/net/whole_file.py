"""Small files that are replaced whole: a crash leaves the old one or the new one."""

import os
from contextlib import suppress

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW


def write_whole(file: str, text: str) -> None:
    """Replace the file, readable by its owner only.

    Raises OSError; the old one stays then, unless all that failed is to sync the directory.
    Small and local, so it is written at once, and synced: what others rely on must not be lost with
    the power.
    """
    beside = f"{file}.new"
    # Never into a file that is there: others might read it, or it leads elsewhere.
    with suppress(FileNotFoundError):
        os.unlink(beside)
    with os.fdopen(os.open(beside, _NEW, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)
    directory = os.open(os.path.dirname(file) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
