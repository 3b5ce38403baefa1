"""The `dsv4` command: one small function a subcommand, and what they print."""
