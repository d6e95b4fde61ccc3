"""Preference optimisation: losses, log-probabilities, collation, trainer. Importing it is cheap."""
