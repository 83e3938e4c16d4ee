"""Talking to a model about a picture: `conversation` is the class, `python -m rlaifv.chat` the command."""

BASE_MODEL = "models/tiny/policy"
"""The shipped policy, which has seen drawings only."""
