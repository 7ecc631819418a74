"""The experiments and the closed-formula world. Nothing else in the package imports it."""
