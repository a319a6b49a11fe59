"""Stages: each takes artifacts from disk and leaves one artifact on disk."""
