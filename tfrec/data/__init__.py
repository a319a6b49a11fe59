"""Data: interactions, catalog and users, their sources, splits and batches."""
