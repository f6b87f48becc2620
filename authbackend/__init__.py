"""Device authentication and authorization for RabbitMQ."""

__version__ = "0.1.0"
