"""Text shipped with the package; origin and licence in README.md beside it."""
