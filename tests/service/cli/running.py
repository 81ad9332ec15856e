"""Runs commands in this process."""

from __future__ import annotations

import re

from click.testing import Result
from typer.testing import CliRunner

from service.cli import main as cli


def run(*arguments: object, columns: int = 400) -> Result:
    env = {"COLUMNS": str(columns)}
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env=env)


def said(result: Result) -> str:
    """The printed text, without boxes and line breaks."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout + result.stderr)
    return re.sub(r"[\s│╭╮╰╯─]+", " ", plain)
