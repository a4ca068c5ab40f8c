"""The exceptions that a user is meant to read."""


class BadInput(ValueError):
    """Wrong use or wrong input: one line that says what, where and the mend."""


class NotOnWavefront(BadInput):
    """This model cannot run on the wavefront; it may run through nnsight."""


class Lost(Exception):
    """What keeps several processes together has ended: the launcher, or the first process."""
