"""The error that a user can do something about."""


class UserError(ValueError):
    """Input that cannot be used: a file, a recipe, an option, a model.

    The message says what is wrong, where, what was got and what is allowed.

    The command line prints it as one message and ends with exit code 2. Any other error is a fault of the program: it
    ends with exit code 1 and a traceback.
    """
