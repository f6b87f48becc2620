"""
Tests against a real RabbitMQ, with the very files of ``rabbitmq/``. Run them with ``tools/test-broker``.
"""
