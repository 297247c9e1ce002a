"""What a person starts: modes of the main command, and the import of official checkpoints."""
