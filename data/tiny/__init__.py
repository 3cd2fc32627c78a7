"""The embedded tiny world: everything the default recipe trains on, made from a seed, no download."""
