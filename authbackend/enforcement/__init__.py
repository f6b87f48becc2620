"""Makes a verdict true for what is already connected: closes connections, deletes sessions, looks again, says so."""
