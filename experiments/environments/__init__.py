"""Run tests in environments that differ from the usual one."""
