"""The exceptions that carry a message to the user instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and what to do, in one sentence.

    The command line prints it without a traceback and exits with 2. It is no `ValueError`,
    because the flag parser would catch those and wrap them into its own words.
    """


class ProofError(Exception):
    """A converted model that does not do what its parent does. The command line exits with 1."""
