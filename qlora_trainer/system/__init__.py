"""What every room stands on: what leaves the process as text (`redact`), the terminal (`terminal`), the
user's cache (`cache`)."""
