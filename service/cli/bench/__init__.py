"""The load generator behind `heatlens bench`."""
