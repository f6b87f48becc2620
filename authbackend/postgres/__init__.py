"""Access to PostgreSQL; no other package imports asyncpg."""
