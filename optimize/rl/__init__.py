"""Local models: the built-in engine, its adapters, and what trains them."""
