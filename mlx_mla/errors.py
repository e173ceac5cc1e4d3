"""The one exception that means "the user's input was wrong"."""


class UserError(ValueError):
    """A mistake in the user's input, told in one line: what, where, and what to do about it.

    Commands print the message to stderr and exit with code 2, without a traceback. Anything else
    that escapes is a fault of this project.
    """


def flag(name: str) -> str:
    """The command-line spelling of a setting, for messages."""
    return "--" + name.replace("_", "-")
