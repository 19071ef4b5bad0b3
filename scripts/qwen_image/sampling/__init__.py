"""Sample pictures: prompt files, generation with the model's own scheduler, contact sheets."""
