"""Profiles of params/: choosing one, rehearsing one before it is paid for, comparing several as experiments."""
