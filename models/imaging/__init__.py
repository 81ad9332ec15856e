"""Images with numpy and Pillow only: decode, preprocess, and draw maps."""
