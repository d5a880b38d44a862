"""Recipes: several trainings that together are one method. One file each; ``regrow recipe`` runs them."""

from regrow.recipes.base import Recipe, Result, available, recipe_named

__all__ = ["Recipe", "Result", "available", "recipe_named"]
