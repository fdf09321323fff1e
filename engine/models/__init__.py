"""Model families, one file each, and the registry that picks one by the architecture's name."""
