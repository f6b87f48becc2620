"""A load generator for RabbitMQ's MQTT door: a fleet of devices, each with a TLS client certificate of its own."""
