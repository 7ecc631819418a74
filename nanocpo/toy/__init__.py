"""The toy world: a painter whose attributes are known, a critic that reads them from pixels."""
