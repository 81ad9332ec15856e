"""Bytes to arrays to pictures: decode, preprocess, render. numpy and Pillow only."""
