"""
The HTTP endpoints that RabbitMQ's HTTP auth backend calls.

The bounded HTTP server and its TLS serve the listeners for people and for health as well. The endpoints decide from ``registry`` by ``policy``, without the database and without the disk.
"""
