"""The listeners for people, and for balancers, brokers' hosts and Prometheus."""
