"""What every room stands on: what leaves the process as text (`redact`), and the terminal (`terminal`)."""
