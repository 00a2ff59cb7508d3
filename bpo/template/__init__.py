"""The page template of executed notebooks and the filters that it calls."""
