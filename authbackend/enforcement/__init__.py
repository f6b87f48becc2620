"""Enforce changes on clients that are already connected: close connections, repair sessions, keep receipts."""
