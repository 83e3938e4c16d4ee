"""Asking a checkpoint, in this process or behind a server."""
