"""What a trained model can do: one file a question."""
