"""The one exception that a user is meant to read."""


class BadInput(ValueError):
    """Wrong use or wrong input: one line that says what, where and the mend."""
