"""Finding models: embeddings and their index, conditions on cards."""
