"""Load-time preparation: faster variants of a model that give the same scores and maps."""
