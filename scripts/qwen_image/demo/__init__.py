"""The embedded demo: pictures, captions and tiny checkpoints of the real classes."""
