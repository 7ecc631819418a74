"""The experiments and the closed-formula world. Nothing outside of this folder needs it."""
