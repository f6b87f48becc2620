"""
Tests against a real RabbitMQ with the files of ``rabbitmq/``; run them with ``tools/test-broker``.
"""
