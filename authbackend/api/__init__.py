"""The admin listener: explanations as JSON and as text."""
