"""A store for many models: cards, contents kept once, aligned differences, search, duplicates, families.

store, card    the zoo as its users see it
pack, forest   which models are kept as differences to which
distance       how far models lie apart, which embeddings are nearest
cache          models that were read, kept as long as there is room
exchange/      models on their way in and out: sources, what is taken down of them, files
storage/       what lies in the folder: catalogue, blobs, contents; how they change, what is checked
delta/         one model as the difference to another: alignment, prediction, entropy coding
find/          embeddings and their index, conditions
kin/           families, the tree of parents, duplicates
"""
