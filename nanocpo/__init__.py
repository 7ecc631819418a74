"""nanocpo: Complex Preference Optimization (arXiv 2601.04300) for diffusion models, small enough to
read in an evening. Start with losses.py and method.py."""
