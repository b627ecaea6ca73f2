"""What the three servers share: gRPC host, health, drain, authentication, configuration, registration, error table."""
