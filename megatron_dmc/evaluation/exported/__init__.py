"""What a Hugging Face folder has kept of the model that it was made from, measured as it is served."""
