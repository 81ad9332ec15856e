"""Rows of the pixels methods."""

from models.methods.row import Method

ROWS: tuple[Method, ...] = ()
