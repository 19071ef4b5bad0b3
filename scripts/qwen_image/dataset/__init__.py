"""Datasets: what the user's folders and JSONL files hold, and how a picture becomes pixels of a bucket."""
