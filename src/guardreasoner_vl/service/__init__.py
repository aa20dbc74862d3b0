"""The guard as an HTTP service."""
