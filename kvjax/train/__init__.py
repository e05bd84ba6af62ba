"""Training of the model that ships: documents, steps, checkpoints, and the loop over stages of growing context."""
