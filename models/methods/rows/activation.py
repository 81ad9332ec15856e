"""Rows of the activation methods."""

from models.methods.row import Method

ROWS: tuple[Method, ...] = ()
