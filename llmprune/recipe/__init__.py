"""Recipes: everything that decides the masks of a run, as dataclasses whose values were checked."""
