"""What a dataset and its trainings were made from and what was made, locked in a file, verified, and made again."""
