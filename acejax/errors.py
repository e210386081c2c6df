"""The one exception that means "the user can mend this": commands print it alone and exit with code 2."""


class UserError(ValueError):
    """A mistake in what the user gave: names the file, line or field, what was found and what was expected."""
