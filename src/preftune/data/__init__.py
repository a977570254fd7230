"""Preference data that is known to be right: load any of it, turn it into one form, check it."""

from preftune.data.findings import DataError, Finding
from preftune.data.loading import Data, load

__all__ = ["Data", "DataError", "Finding", "load"]
