"""The face towards RabbitMQ."""
