"""The exceptions of tfrec and the exit codes they end a command with.

    TfrecError
     ├── InputError        2   data or an argument is wrong: a file, a column, a value
     ├── ConfigError       2   a configuration key or value is wrong
     ├── ArtifactError     2   an artifact is missing, unfinished, foreign, or its bytes changed
     └── SetupError        3   the machine lacks something: network, disk, an extra, a device
          └── StateError   3   the store of a server's state cannot be reached or written

Every message is one line that names the thing, the value received and what to do. Any other
exception is a bug of ours (exit code 1); an interrupt by the user ends with 130.
"""


class TfrecError(Exception):
    """Base of every error that tfrec raises on purpose."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class InputError(TfrecError, ValueError):
    """Data or an argument given by the user cannot be used as it is."""


class ConfigError(TfrecError, ValueError):
    """A configuration key is unknown or its value out of range."""


class ArtifactError(TfrecError):
    """An artifact is missing, unfinished, of another kind or version, or was changed."""


class SetupError(TfrecError):
    """The machine lacks what the command needs: network, disk space, an installed extra."""

    exit_code = 3


class StateError(SetupError):
    """The store of a server's state cannot be reached or written."""
