"""Running the method: settings, flags, the flow of both stages, what CPO is compared with."""
