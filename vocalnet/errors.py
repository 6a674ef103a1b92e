"""Errors a user can act on: one line that says what was given, what is allowed, and what to do."""


class VocalNetError(Exception):
    """Base class. The command line prints the message without a traceback and exits with status 2."""


class AudioError(VocalNetError):
    """The audio cannot be used: unreadable, empty, not finite, too short or too long."""


class ConfigError(VocalNetError):
    """A configuration holds an unknown key, a value of the wrong type, or values that contradict each other."""


class CheckpointError(VocalNetError):
    """A model folder lacks files, has the wrong shapes, or does not match its configuration."""


class DownloadError(VocalNetError):
    """A base model could not be fetched, or what arrived does not match its sha256."""


class DataError(VocalNetError):
    """A prepared data folder is missing, incomplete or inconsistent with its manifest."""
