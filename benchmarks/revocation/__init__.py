"""How soon a revocation is true on the wire, on a RabbitMQ 4.3 cluster of three nodes; run it with ``make bench``."""
