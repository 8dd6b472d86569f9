"""The command line as a user meets it."""

import re

from click.testing import CliRunner, Result

from dmq_export.cli import main

TINY = ["--samples", "2", "--steps", "3", "--les-iters", "2"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, message: str) -> None:
    """Exit 2, nothing on stdout, and exactly one line that matches ``message``."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.fullmatch(rf"Error: .*{message}.*\n", result.stderr), result.stderr
