"""What fledge's scripts stand on, one subject a file."""


class UserError(Exception):
    """What a user can get wrong: shown as one line, with exit code 2 (fledge.configurator sees to it)."""
