"""Comparing trainings: what each one left behind, a ranking, and a report."""
