"""Tools that know nothing of the method: files, flags, picture grids, the optimiser."""
