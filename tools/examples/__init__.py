"""Programs to start from: each does one thing through the Python interface, and a test runs it."""
