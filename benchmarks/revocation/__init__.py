"""Measures how soon a revocation takes effect on connections, on a RabbitMQ 4.3 cluster of three nodes."""
