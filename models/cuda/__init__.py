"""What only CUDA devices have use for: uploads on a stream of their own, and passes replayed as graphs."""
