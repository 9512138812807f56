"""Recipes: what decides every mask, as checked dataclasses."""
