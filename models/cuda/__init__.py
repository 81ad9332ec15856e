"""CUDA only: uploads on a stream of their own, and passes that are replayed as graphs."""
