"""Every exception, by whose fault it is."""


class SerfdError(Exception):
    """The base of all errors serfd raises on purpose. Its text is written for a person."""


class WireError(SerfdError):
    """A peer sent bytes that are not what they claim to be.

    Raised in `wire`, caught where the packet or stream came in: counted, told, dropped.
    """


class CommandError(SerfdError):
    """What the caller asked for cannot be done. Its text is the RPC's error text."""


class JoinFailed(CommandError):
    """No address of a join answered. Its text lists every address with its reason."""


class ConfigError(SerfdError):
    """The operator's settings are wrong. Its text names the file, the key and what was expected."""
