"""How much memory a training step takes, known without weights, without a GPU and without a network."""
