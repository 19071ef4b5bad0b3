"""Several trainings from one configuration: their table, and the caches that they share."""
