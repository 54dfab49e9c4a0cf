"""Other trainers beside this package, on the same rows and the same model: python -m benchmarks.peers."""
