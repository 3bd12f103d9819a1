"""The random test of the promises: a scratch volume, a model of what it owes, and processes that are killed."""
