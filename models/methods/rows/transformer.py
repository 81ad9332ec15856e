"""Rows of the transformer methods."""

from models.methods.row import Method

ROWS: tuple[Method, ...] = ()
