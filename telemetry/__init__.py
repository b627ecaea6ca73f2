"""Every metric and every span name, declared once."""
