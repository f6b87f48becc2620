"""
The HTTP endpoints that RabbitMQ's HTTP auth backend calls.

They decide from ``registry`` by ``policy``, without the database and without the disk.
"""
