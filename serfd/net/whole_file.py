"""Small files that are replaced whole: a crash leaves the old one or the new one."""

import os


def write_whole(file: str, text: str) -> None:
    """Replace the file, readable by its owner only. Raises OSError, and then the old one stays.

    Small and local, so it is written at once, and synced: what others rely on must not be lost with
    the power.
    """
    beside = f"{file}.new"
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(beside, file)
