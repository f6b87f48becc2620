"""The compose project and what prepares it, without Docker."""
