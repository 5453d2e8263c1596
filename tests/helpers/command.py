"""The command line, run in the test's own process."""

from typer.testing import CliRunner

from rgtg.cli.main import app


def verb(*name):
    """A function that runs ``rgtg NAME ARGUMENTS…`` in this process; without a name, the arguments begin with it."""

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in (*name, *arguments)])

    return run
