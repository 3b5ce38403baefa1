"""`python -m dsv4_jax` is the `dsv4` command."""

from dsv4_jax.command_line.main import main

if __name__ == "__main__":
    main()
