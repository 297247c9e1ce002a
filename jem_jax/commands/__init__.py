"""The commands: modes of the main one, and the import of official checkpoints."""
