"""The embedded tiny world: the default that runs where nothing can be downloaded."""
