"""Rows of the METHODS table, one file for each family. No torch here."""
