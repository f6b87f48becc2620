"""The copy of the registry that decisions are made from, and what keeps it up to date."""
