"""Checkpoints: what kind of file it is, and how its tensors get into the real model classes."""
