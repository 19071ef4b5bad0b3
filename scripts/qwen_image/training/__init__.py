"""The trainer: arguments, batches, flow matching, adapter, schedule, checkpoints and the loop."""
