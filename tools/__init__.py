"""Command-line helpers of the repository: real test inputs, the lock file, the demo. Not part of the l4q API."""
