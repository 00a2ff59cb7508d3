"""Bootstrapped Preference Optimization (arXiv 2403.08730) for vision-language checkpoints.

A small library that the notebooks call. Each module says in its first lines what it is for.
"""
