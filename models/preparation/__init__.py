"""Load-time preparation: a faster variant of a model that gives the same answers."""
