"""Errors that are a person's to mend: one sentence each, shown without a traceback."""


class UserError(Exception):
    """Something outside the code is wrong. The message is a sentence that names the key or file, what was
    found and what is allowed; the command line prints it and exits with 2."""


class ConfigError(UserError):
    """A configuration key is unknown or has a value that is not allowed."""


class DataError(UserError):
    """Shards are missing, unreadable, or hold too many bad samples."""


class CheckpointError(UserError):
    """A checkpoint or weight file is missing, unsafe, or does not fit the model."""
