"""The one family of errors a user can cause.

A message says what was found, where, what is allowed and what to do next, on one line. Anything else that
is raised is a bug of ours and may end in a traceback.
"""


class DmqError(Exception):
    """Bad usage or input; the command line prints the message and exits with :attr:`exit_code`."""

    exit_code = 2


class ModelError(DmqError):
    """The source model is missing, is not a diffusers denoiser, or cannot be run."""


class CheckpointError(DmqError):
    """A DMQ checkpoint is missing, damaged, or of another schema version."""


class ExportError(DmqError):
    """A layer or a model cannot be expressed in the requested form."""


class StoppedError(DmqError):
    """The user stopped it."""

    exit_code = 130  # as shells have it: 128 and SIGINT


class CheckFailedError(DmqError):
    """The work was done, but a check of its result failed."""

    exit_code = 1
