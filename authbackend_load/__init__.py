"""A load generator for MQTT on RabbitMQ: a fleet of devices, each with its own TLS client certificate."""
