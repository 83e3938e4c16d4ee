"""Profiles of params/: choosing one, and rehearsing one before it is paid for."""
