"""A store for many models: cards, contents kept once, aligned differences, search, duplicates, families."""
