"""Faithfulness of maps: do the pixels that a map ranks first make the model's answer?"""
