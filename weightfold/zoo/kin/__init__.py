"""Who is related to whom: families, the tree of parents, duplicates."""
