"""The adapter that is trained: which modules it is on, what it computes, and its files in every naming scheme."""
