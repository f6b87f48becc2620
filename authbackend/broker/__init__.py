"""HTTP endpoints for RabbitMQ."""
