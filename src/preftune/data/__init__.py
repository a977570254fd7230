"""Preference data that is known to be right: load any of it, turn it into one form, check it."""
