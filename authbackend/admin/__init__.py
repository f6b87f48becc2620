"""The face towards people and Prometheus."""
