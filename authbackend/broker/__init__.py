"""The HTTP endpoints that RabbitMQ's HTTP auth backend calls; no database and no disk on the request path."""
