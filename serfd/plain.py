"""Text of strangers within a line: it can neither forge another line nor steer a terminal."""


def plain(text: str) -> str:
    r"""The text with escapes for what is not printable: a newline is written `\n`."""
    if text.isprintable():
        return text
    return "".join([char if char.isprintable() else _escaped(char) for char in text])


def lines(text: str) -> str:
    """As `plain`, but newlines and tabs are kept."""
    return "\n".join(["\t".join(map(plain, line.split("\t"))) for line in text.split("\n")])


def _escaped(char: str) -> str:
    # What was not UTF-8 comes as a lone surrogate that holds the byte.
    if "\udc80" <= char <= "\udcff":
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
