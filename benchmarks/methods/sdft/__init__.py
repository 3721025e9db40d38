"""A model that reads demonstrations, which the shipped one does not: for the curve of the preset ``sdft``."""
